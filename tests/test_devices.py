"""Devices that do not meet, without a GPU: tensors that say they are on one, and are computed with on the CPU.

What a GPU would refuse, an operation on tensors of both devices, is refused here too. Gradients are not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from calm_pl.backbone.lalm import FrozenLALM
from calm_pl.baselines import GRW, SAV, KNearest, LinearProbe, MeanOfHeads, NearestPrototype
from calm_pl.data.manifest import read_manifest
from calm_pl.methods.base import HeadClassifier
from calm_pl.methods.calm import Calm
from calm_pl.methods.learned import LearnedWeights
from calm_pl.methods.metric_space import Whitened
from calm_pl.methods.selection import Grid
from calm_pl.methods.settings import Search
from calm_pl.training.batch_size import _ballast
from tests.test_baselines import make_set

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu does it on the GPU that is here")

ATEN = torch.ops.aten
COPIES = (ATEN._to_copy.default, ATEN.copy_.default)
INDEXED = (ATEN.index.Tensor, ATEN.index_put_.default)


class OnGPU(Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGPU:
        about = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: OnGPU = Tensor._make_wrapper_subclass(cls, held.size(), **about, device="cuda:0")
        made.held = held.detach()
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class PretendedGPU(TorchDispatchMode):
    """Within it, what is made on a GPU is `OnGPU`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in COPIES:
        looked_at = args[:1]
    elif func in INDEXED and isinstance(args[0], OnGPU):
        looked_at = (args[0], args[2:])  # its indices may lie on the CPU
    else:
        looked_at = (args, kwargs)
    tensors = [x for x in tree_leaves(looked_at) if isinstance(x, Tensor)]
    on_gpu = any(isinstance(x, OnGPU) for x in tensors)
    here = [tuple(x.shape) for x in tensors if not isinstance(x, OnGPU) and x.dim()]  # numbers may come from the CPU
    if on_gpu and here:
        raise RuntimeError(f"{func}: tensors on the GPU and on the CPU, {here}")
    if "device" in kwargs:
        on_gpu = torch.device(kwargs["device"]).type == "cuda"
        kwargs = {**kwargs, "device": "cpu"}
    args, kwargs = tree_map_only(OnGPU, lambda x: x.held, (args, kwargs))
    found = func(*args, **kwargs)
    return tree_map_only(Tensor, OnGPU, found) if on_gpu else found


@pytest.fixture
def gpu(monkeypatch) -> Iterator[Callable[[Tensor], Tensor]]:
    """Moves tensors to the pretended GPU."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(Tensor, "backward", lambda loss: None)
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") then passes by the mode
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with PretendedGPU():
            yield lambda x: x.to("cuda")
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_devices_that_do_not_meet_are_refused(gpu):
    with pytest.raises(RuntimeError, match="on the GPU and on the CPU"):
        gpu(torch.ones(3)) + torch.ones(3)
    with pytest.raises(RuntimeError, match="on the GPU and on the CPU"):
        torch.ones(3)[gpu(torch.arange(2))]
    assert gpu(torch.ones(3))[torch.arange(2)].device.type == "cuda"
    assert (gpu(torch.ones(3)) + torch.tensor(1)).tolist() == [2, 2, 2]


FEW = Search(
    centre=(0.8,), round_clips=(4.0,), tau=(0.1,), power=(1.0,), penalties=((1.0, 1.0),), steps=(2,), lr=(0.1,)
)
GRID = Grid(tau=(0.1,), tau_w=(1.0,), alpha=(0.0, 5.0), shrinkage=(0.3, "ledoit_wolf"))
METHODS: dict[str, Callable[[], HeadClassifier]] = {
    "sav": SAV,
    "grw": GRW,
    "linear_probe": LinearProbe,
    "nearest": KNearest,
    "prototype": NearestPrototype,
    "mean": MeanOfHeads,
    "calm": lambda: Calm(grid=GRID),
    "calm_whitened": lambda: Calm("whitened", metric_rank=2, grid=GRID),
    "whitened_probe": lambda: Whitened(LinearProbe()),
    "learned": lambda: LearnedWeights(search=FEW),
    "factors": lambda: LearnedWeights(
        alpha=1.0, rank=2, temperature="global", class_bias=True, averaging=0.5, head_dropout=0.3, search=FEW, steps=2
    ),
    "episodes": lambda: LearnedWeights(temperature="per_head", shots=1, shrinkage="oas", search=FEW, steps=2),
}


@pytest.mark.parametrize("support", ["three shots", "one shot", "a class of one clip", "several labels a clip"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_keep_to_the_device_of_the_heads(gpu, name, support):
    heads, labels = make_set(1 if support == "one shot" else 3)
    if support == "a class of one clip":
        kept = (labels < 3) | (torch.arange(len(labels)) < 4)
        heads, labels = heads[kept], labels[kept]
    if support == "several labels a clip":
        heads, labels = torch.cat([heads, heads[:3]]), torch.cat([labels, (labels[:3] + 1) % 4])
    on_cpu = METHODS[name]().fit(heads, labels, 4)
    method = METHODS[name]().fit(gpu(heads), gpu(labels), 4)
    found = method(gpu(heads))
    assert found.device.type == "cuda"
    assert_close(found.cpu(), on_cpu(heads))


def test_averages_of_a_checkpoint_go_on_where_the_weights_are(gpu):
    heads, labels = make_set(3)
    learned = LearnedWeights(averaging=0.5, search=FEW).start(gpu(heads), gpu(labels), 4)
    learned.averages = {"moves_KC": torch.ones(learned.start_logits_KC.shape)}  # as a checkpoint is read
    learned.after_step()
    assert learned.averages["moves_KC"].device.type == "cuda"
    assert learned.averages["moves_KC"].unique().tolist() == [0.5]


@pytest.mark.parametrize("pooling", ["last", "last:3", "audio"])
def test_heads_are_taken_where_the_model_is(gpu, tones, tiny_lalm, pooling):
    clips = read_manifest(tones)[:3]
    expected = FrozenLALM.from_pretrained(tiny_lalm, heads="both", pooling=pooling).head_outputs(clips)
    lalm = FrozenLALM.from_pretrained(tiny_lalm, heads="both", pooling=pooling, device="cuda")
    inputs = lalm.processor(clips, [lalm.processor.load(clip) for clip in clips])
    with torch.no_grad():  # tensors of inference_mode cannot be pretended
        found = FrozenLALM.forward.__wrapped__(lalm, inputs)
    assert found.device.type == "cuda"
    assert_close(found.cpu(), expected, atol=1e-5, rtol=0)


def test_the_margin_is_of_all_memory_that_a_batch_may_take(gpu, monkeypatch):
    free = [100]  # while torch keeps what an earlier pass took
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(1000))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 2000))
    ballast = _ballast(torch.device("cuda"))
    assert ballast is not None and len(ballast) == 100
