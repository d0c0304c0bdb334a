"""Batches as `train_sampling_strategy="group_by_length"` makes them, for a run too short to see them all."""

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices


def fair_sample(lengths, batch_size, steps):
    """Rows to be read in sequence, `steps` batches long.

    All of an epoch's batches, made by transformers' own function, are put in order of their tokens; the second half of
    the run takes some at even distances from the shortest to the longest, and so does the first, which is warm-up.
    """
    order = get_length_grouped_indices(lengths, batch_size, generator=torch.Generator().manual_seed(0))
    batches = [order[start : start + batch_size] for start in range(0, len(order) - batch_size + 1, batch_size)]
    batches.sort(key=lambda batch: sum(lengths[index] for index in batch))
    half = max(1, steps // 2)
    picked = [int((step + 0.5) * len(batches) / half) for step in range(half)]
    warm_up = [max(0, index - 1) for index in picked] * 2
    chosen = [*warm_up[: steps - half], *picked]
    return [index for batch in chosen for index in batches[batch]]
