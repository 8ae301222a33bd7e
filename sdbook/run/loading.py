"""How the pictures of a step reach a process: one after the other, or from a stream."""

from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from .progress import leave_signals_to_main


def as_it_is(batch):
    """The collation of a dataset that already gives whole batches."""
    return batch


def step_loader(
    dataset: Dataset, sampler: Sampler, collate=None, num_workers: int = 0
) -> DataLoader:
    """A process's batches, as a `StepSampler` names them.

    A stream (a dataset with `steps`) has no numbers, and deals its pictures out itself.
    """
    workers = {"num_workers": num_workers, "worker_init_fn": leave_signals_to_main}
    if hasattr(dataset, "steps"):
        count, share = sampler.micro_batches, sampler.batch_size // sampler.world
        batches = dataset.steps(
            share // count, sampler.seed, sampler.first * count, sampler.last * count,
            sampler.rank, sampler.world,
        )  # fmt: skip
        collate = collate or default_collate
        return DataLoader(batches, batch_size=None, collate_fn=collate, **workers)
    return DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate,
        persistent_workers=num_workers > 0, **workers,
    )  # fmt: skip
