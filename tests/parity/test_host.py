"""Forward and backward never ask the device for a value, so that a GPU's queue never runs empty.

The meta device stands in for a GPU: it has shapes but no values.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nvlm.arch.pipeline import build_parts
from nvlm.attention.rows import samples_in_line
from nvlm.data.batch import in_line
from nvlm.data.pack import collate
from nvlm.processes import device
from nvlm.vision.encoders.registry import description_of
from nvlm.vision.path import frozen, solo_groups
from tests.models import TILE, sample_of, small_config
from tests.stories import ONE, ONE_TILE, TEXT, TWO

META = torch.device("meta")
ASKING = {
    "_local_scalar_dense", "equal", "is_nonzero", "masked_scatter_backward", "masked_select", "nonzero",
    "repeat_interleave", "unique_consecutive", "_unique2",
}  # fmt: skip


class Asked(AssertionError):
    pass


class NothingAsked(TorchDispatchMode):
    """Raises Asked where the host would have to wait for the meta device if it were a GPU: where a value or a shape
    depends on its values, and in copies that wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        there = any(x.is_meta for x in tensors)
        if there and name in ASKING:
            raise Asked(name)
        by_mask = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if there and by_mask and not (len(args) > 2 and args[2].numel() == 1):  # one number is filled in
            raise Asked(f"{name} by a mask")
        out = func(*args, **kwargs)
        if name == "_to_copy" and out.is_meta != args[0].is_meta:
            copied(args[0], bool(kwargs.get("non_blocking")))
        if name == "copy_" and args[0].is_meta != args[1].is_meta:
            copied(args[1], bool(args[2:] and args[2]))
        return out


def copied(source: torch.Tensor, non_blocking: bool) -> None:
    """Raises Asked for a copy between host and device that waits."""
    if not non_blocking:
        raise Asked("a copy that waits")
    if not source.is_meta and not hasattr(source, "page_locked"):
        raise Asked("a copy from memory that is not page-locked")


class NothingMade(TorchFunctionMode):
    """Raises Asked where the host makes a tensor of Python numbers on the meta device: torch copies them and waits."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor) and META == torch.device((kwargs or {}).get("device") or "cpu"):
            raise Asked("numbers that are copied")
        return func(*args, **kwargs or {})


@pytest.fixture(autouse=True)
def locked(monkeypatch):
    """A stand-in for page-locked memory, which needs a GPU."""

    def page_locked(x: torch.Tensor, place: torch.device) -> torch.Tensor:
        x = x.clone() if place == META and x.is_cpu else x
        x.page_locked = True
        return x

    monkeypatch.setattr(device, "page_locked", page_locked)


def batch_on_meta(config):
    rows = [[TEXT, TWO], [ONE, ONE_TILE], [TEXT]]
    batch = collate([[sample_of(story, config) for story in row] for row in rows], TILE).to(META)
    width = config.vision.hidden * config.vision.downsample**2
    return batch.with_features(torch.empty(int(batch.tile_tokens.sum()), width, device="meta"))


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("arch", ["decoder", "xattn", "hybrid"])
def test_forward_and_backward_ask_for_no_number(arch, recompute, megatron):
    config = small_config(f"arch={arch}", "tiling.tag=1d", f"train.recompute={recompute}")
    with torch.device("meta"):
        model = build_parts(config)[0].to(META)
    batch = batch_on_meta(config)
    with NothingMade(), NothingAsked():
        loss_BS = model(batch)
        torch.autograd.backward(loss_BS.sum())
    assert loss_BS.is_meta and loss_BS.shape == batch.tokens.shape
    assert all(parameter.grad is not None for parameter in model.parameters())
    with NothingAsked(), pytest.raises(Asked):
        model(replace(batch, host=None))


def test_a_line_is_cut_without_asking(megatron):
    config = small_config("arch=hybrid")
    batch = batch_on_meta(config)
    with NothingAsked():
        line = in_line(batch)
        packed = samples_in_line(line.on_host.sample[0], 64, META)
    assert packed.cu_seqlens_q.is_meta and len(packed.cu_seqlens_q) > 5
    with NothingAsked(), pytest.raises(Asked):
        samples_in_line(line.sample[0], 64, META)


def test_a_batch_moves_and_its_tiles_are_encoded_without_waiting(megatron):
    config = small_config("arch=hybrid", "vision.tiles_per_call=2", "vision.graph=false")
    batch = collate([[sample_of(TWO, config)]], TILE)
    with META:
        path = frozen(description_of(config.vision).build(config, solo_groups()).to(META), config)
    with NothingMade(), NothingAsked():
        moved = batch.to(META)
        features_NC = path.features(moved.pixels)
    assert len(moved.pixels) > 2 and features_NC.is_meta and len(features_NC) == int(batch.tile_tokens.sum())
    with NothingAsked(), pytest.raises(Asked, match="not page-locked"):
        batch.tokens.to(META, non_blocking=True)
    with NothingMade(), pytest.raises(Asked):
        torch.tensor([0.5], device=META)


def test_a_batch_that_was_changed_alone_is_not_asked(megatron):
    batch = batch_on_meta(small_config("arch=decoder"))
    assert batch.on_host.tokens.device.type == "cpu" and batch.on_host.on_host is batch.on_host
    shorter = replace(batch, tokens=batch.tokens[:, :8])
    with pytest.raises(AssertionError, match="its copy on the host"):
        _ = shorter.on_host
