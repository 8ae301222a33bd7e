"""Our tokenizer with CLIP's own 49,408 tokens, which the package open_clip carries.

Witnesses: transformers' padding and cutting, and the tokenizer that CLIP was published
with (open_clip's copy, loaded by itself, since its package imports half of PyTorch).
"""

import gzip
import importlib.util
import json
import unicodedata
from pathlib import Path

import pytest
import transformers

from sdbook.clip import CLIPTextConfig, Tokenizer
from sdbook.files import write_json
from sdbook.pipeline import check_tokenizer
from sdbook.vocabulary import END, START, byte_symbols, merges_of, write_vocabulary

OPEN_CLIP = Path(importlib.util.find_spec("open_clip").origin).parent
SPECIAL = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
LONG = "a painting of a very long train in the hills of a far country, " * 9
TEXTS = """\

a photo of a cat
A Red STAR, above: a blue house!
1234 2024-01-01 3.14 ½ ¼ ²³ Ⅳ ⅷ ٣٤٥ ४५
it's they're we've I'm he'll she'd can't IT'S DON'T i'll've rock'n'roll '' 's
don’t it’s “quotes” — dash … ´
🍎 a red star 🍎🍏 👩‍👩‍👧 🏳️‍🌈 🇩🇪 😀
日本語のテキスト 한국어 텍스트 привет, мир مرحبا שלום क्षि ไทย
ﬁnance Ａｗｉｄｅ 𝒜𝓑 𝔘𝔫𝔦 𐍈 ﷺ
İstanbul ıI Σσς ẞß Ǆ ǅ ǆ ſt ŉ ǰ
_under_ snake_case a/b\\c #hash @at $100 50% C++ 100km/h 5'10" ...!!!??? ((()))
&amp; &lt;b&gt; schÃ¶n <start_of_text> <|endoftext| <|ENDOFTEXT|>
xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx
ééééééééééééééééééééééééééééééééééééééééééééééé""".splitlines()
TEXTS += [" \t\n ", LONG, "a" * 5000, "\u0301", "a\u00adb soft", "Ω Ω K K Å Å"]
TEXTS += ["café", "cafe\u0301", "e\u0301\u0302", "\u1e9b\u0323", "ё е\u0308 й и\u0306"]
TEXTS += ["tab\tnew\nline\r\nreturn\x0bvt\x0cff", "\u00a0nbsp\u00a0em\u2003en\u3000"]
TEXTS += ["line\u2028sep\u2029para\u0085nel", "zero\u200bwidth\u200djoin\ufeffbom"]
TEXTS += ["control\x01\x02\x7f", "nul\x00byte", "\ud7ff\ue000\U0010ffff"]


@pytest.fixture(scope="module")
def vocabulary():
    """Tokens in their order, and merges: the list that OpenAI published."""
    with gzip.open(OPEN_CLIP / "bpe_simple_vocab_16e6.txt.gz", "rt", "utf-8") as file:
        _, *lines = file.read().split("\n")
    merges = [tuple(line.split()) for line in lines[: 49408 - 512 - 2]]
    tokens = byte_symbols() + [symbol + "</w>" for symbol in byte_symbols()]
    return tokens + [a + b for a, b in merges] + [START, END], merges


@pytest.fixture(scope="module")
def folder(vocabulary, tmp_path_factory):
    """vocab.json and merges.txt, as CLIP's repository has them, written by us."""
    path = tmp_path_factory.mktemp("clip")
    write_vocabulary(*vocabulary, path)
    write_json({**SPECIAL, "model_max_length": 77}, path / "tokenizer_config.json")
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def witness():
    """CLIP's first tokenizer, without its mending of broken texts (ftfy and HTML).

    Of 40,000 random texts it differs in three more things from transformers': U+001C to
    U+001F are white to Python alone, a capital sigma at a word's end becomes a final
    one, and letters newer than one library's Unicode are signs.
    """
    spec = importlib.util.spec_from_file_location("witness", OPEN_CLIP / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    first = module._tokenizer

    def clean(text):
        return module.whitespace_clean(unicodedata.normalize("NFC", text)).lower()

    first.clean_fn = clean
    for own, theirs in ((START, "<start_of_text>"), (END, "<end_of_text>")):
        del first.cache[theirs]
        first.encoder[own] = first.encoder.pop(theirs)
    first.pat = module.re.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    )
    return first


def ids_of(tokenizer, text):
    return tokenizer.backend(text, verbose=False)["input_ids"]


def test_the_ids_that_everybody_knows(tokenizer):
    assert len(tokenizer) == 49408 and tokenizer.max_length == 77
    assert (tokenizer.start_id, tokenizer.end_id) == (49406, 49407)
    known = [49406, 320, 1125, 539, 320, 2368, 49407]  # CLIP's README
    assert ids_of(tokenizer, "a photo of a cat") == known
    assert tokenizer("a photo of a cat")[0].tolist() == known + [49407] * 70
    assert tokenizer.decode(tokenizer("A photo of a CAT")[0]) == "a photo of a cat"
    check_tokenizer(tokenizer, CLIPTextConfig())  # it fits Stable Diffusion 1.5


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text)[1:25])
def test_ids_equal_those_of_the_first_tokenizer(tokenizer, witness, text):
    assert ids_of(tokenizer, text) == [49406, *witness.encode(text), 49407]


def test_special_tokens_inside_a_text_are_themselves(tokenizer):
    inner = ids_of(tokenizer, f"a {END} cat {START}dog")[1:-1]
    assert inner == [320, 49407, 2368, 49406, 1929]


@pytest.mark.filterwarnings("ignore:only .* tokens of the prompt fit")
def test_rows_equal_those_of_transformers(tokenizer, folder):
    theirs = transformers.CLIPTokenizerFast.from_pretrained(folder)
    options = dict(padding="max_length", truncation=True, return_tensors="pt")
    texts = [*TEXTS, f"a {END} b"]
    assert (tokenizer(texts) == theirs(texts, **options).input_ids).all()


def test_the_files_go_round(tokenizer, vocabulary, folder, tmp_path):
    """Ours, transformers' newer one (tokenizer.json) and the older two, all equal."""
    tokenizer.save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    tokens, merges = vocabulary
    assert merges_of(tokenizer.backend.backend_tokenizer) == merges
    written = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    found = written["model"]["vocab"]
    assert sorted(found, key=found.get)[:49406] == tokens[:49406]
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    again = Tokenizer.from_pretrained(tmp_path)  # tokenizer.json alone
    assert [ids_of(again, text) for text in TEXTS] == [
        ids_of(tokenizer, text) for text in TEXTS
    ]
