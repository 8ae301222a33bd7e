"""Near twins of scenes: pairs that CLIP can tell apart only by reading.

"a red star above a blue house" comes with "a blue star above a red house". Chapter 6
says why they are needed, and shows some. Written by hand.
"""

from dataclasses import replace

import numpy as np
from torch.utils.data import Dataset

from .images import to_pixels
from .scenes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Request,
    Scene,
    Scenes,
    arrange,
    describe,
    draw,
    is_held_out,
)


def decided(scene: Scene) -> Request:
    """All that a scene shows, whether its caption says it or not."""
    groups = tuple(
        replace(group, colour=thing.colour, size=thing.size)
        for group, thing in zip(
            scene.request.groups, (scene.things[0], scene.things[-1]), strict=False
        )
    )
    return Request(groups, scene.request.relation, scene.background)


def exchange(request: Request, rng: np.random.Generator) -> tuple[Request, str]:
    """Change one point of a request; returns the new one and the point's name.

    Two groups exchange their colours, sizes, counts or shapes, or one of them gets
    another one. Three times out of four, a relation becomes any other one.
    """

    def another(options, than):
        return rng.choice([option for option in options if option != than]).item()

    options = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "count": (1, 2, 3)}
    if request.relation and rng.random() < 0.75:
        relation = another(RELATIONS, request.relation)
        return replace(request, relation=relation), "relation"
    point = rng.choice(list(options)).item()
    values = [getattr(group, point) for group in request.groups]
    if len(set(values)) == 2 and rng.random() < 0.5:
        values.reverse()
    else:
        which = rng.integers(len(values))
        values[which] = another(options[point], values[which])
    groups = (replace(g, **{point: v}) for g, v in zip(request.groups, values))
    return replace(request, groups=tuple(groups)), point


def say_alike(request: Request, like: Request, point: str) -> Request:
    """Leave out what `like` leaves out too, but say the point."""
    groups = tuple(
        replace(
            group,
            colour=group.colour if model.colour or point == "colour" else None,
            size=group.size if model.size or point == "size" else None,
        )
        for group, model in zip(request.groups, like.groups, strict=True)
    )
    background = request.background if like.background else None
    return Request(groups, request.relation, background)


def invent_twin(scene: Scene, rng: np.random.Generator) -> tuple[Request, ...]:
    """The twin, and what the captions of the scene and of its twin say.

    A twin may be shown in training, has room in a picture, and is told apart by
    its caption: "a star and a house" and "a house and a star" are no twins.
    """
    while True:
        twin, point = exchange(decided(scene), rng)
        said, other = (
            say_alike(request, scene.request, point)
            for request in (decided(scene), twin)
        )
        shapes = {group.shape for group in twin.groups}
        room = sum(group.count for group in twin.groups) <= 3
        apart = twin.relation or set(said.groups) != set(other.groups)
        if room and apart and len(shapes) == len(twin.groups):
            if not is_held_out(twin.groups):
                return twin, said, other


class Twins(Dataset):
    """Each scene with a near twin: `((pixels, caption), (pixels, caption))`.

    "a red star above a blue house" comes with "a blue star above a red house". A
    reader of bags of words cannot tell them apart, so CLIP has to learn order. Both
    captions say the point in which the two differ.
    """

    def __init__(self, scenes: Scenes):
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int):
        scene = self.scenes.scene(index)
        rng = np.random.default_rng((self.scenes.seed, 7, index))
        twin, said, other = invent_twin(scene, rng)
        pictures = (
            draw(things, scene.background, self.scenes.side)
            for things in (scene.things, arrange(twin, rng))
        )
        return tuple(
            (to_pixels(picture), describe(request, rng))
            for picture, request in zip(pictures, (said, other))
        )
