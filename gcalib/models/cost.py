"""What a model costs: its parameters and the floating-point operations of a training step."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from gcalib.data.batches import make_batch
from gcalib.data.pair import Pair
from gcalib.models.base import Recommender

# torch's counter knows the attention of GPUs only
CPU_ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters by kind.

    Returns
    -------
    dict
        `params_total`; `params_trainable`; `params_embedding`, those of the embedding tables, trained or not;
        `params_network`, the trainable ones outside the tables, which is what cross-attention adds to and what
        baselines are matched in.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    sizes = [(p.numel(), p.requires_grad, id(p) in tables) for p in model.parameters()]
    return {
        "params_total": sum(size for size, _, _ in sizes),
        "params_trainable": sum(size for size, trained, _ in sizes if trained),
        "params_embedding": sum(size for size, _, table in sizes if table),
        "params_network": sum(size for size, trained, table in sizes if trained and not table),
    }


def flops_per_step(model: Recommender, pair: Pair, batch_size: int, seed: int = 0) -> int:
    """Floating-point operations of the matrix products and attention of one training step, forward and backward.

    Counted by torch on one batch of users spread evenly over all lengths, on the device that holds the model. The
    model's gradients are cleared.
    """
    device = next(model.parameters()).device
    training = pair.split("val")
    size = min(batch_size, pair.num_users)
    users = np.argsort(training.lengths, kind="stable")[np.linspace(0, pair.num_users - 1, size).astype(int)]
    batch = make_batch(
        [training.history(user) for user in users], pair.num_items[0], window=model.window, training=True,
        tails=model.reads_tails, as_published=model.as_published, users=users, clock=pair.has_clock,
    )  # fmt: skip
    negatives = model.negatives(batch, np.random.default_rng(seed)).to(device)
    was_training = model.training
    model.train()
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION_FLOPS)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), counter:
        torch.manual_seed(seed)  # a model may draw which users it reads, and the count should not depend on the process
        losses = model.loss(batch.to(device), negatives)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    model.train(was_training)
    return int(counter.get_total_flops())
