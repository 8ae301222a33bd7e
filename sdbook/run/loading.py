"""How the pictures of a step reach a process."""

from torch.utils.data import DataLoader, Dataset, Sampler

from .progress import leave_signals_to_main


def as_it_is(batch):
    """The collation of a dataset that already gives whole batches."""
    return batch


def step_loader(
    dataset: Dataset, sampler: Sampler, collate=None, num_workers: int = 0
) -> DataLoader:
    """A process's batches, as a `StepSampler` names them."""
    return DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers,
        worker_init_fn=leave_signals_to_main, persistent_workers=num_workers > 0,
    )  # fmt: skip
