"""The plugin for vLLM, against stand-ins of the classes that it builds on; vLLM itself is not here."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from test_otp import HOW
from torch import nn

from moecule.errors import PlanError
from moecule.export import export
from moecule.moe import experts_in, find_layers
from moecule.plan import Drop, Keep, Masks
from moecule.runtime import packed_of

WIDTHS = (1, 2, 3, 4, 8, 16, 5, 2)  # of a layer's experts
FAMILIES = ("qwen3_moe", "mixtral")


class QuantizationConfig:
    """As vLLM 0.33 has it, but for what nothing here calls."""

    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class FusedMoEMethodBase:
    def __init__(self, moe: Any) -> None:
        self.moe, self.moe_quant_config, self.moe_kernel = moe, None, None

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int,
        intermediate_size_per_partition: int, params_dtype: torch.dtype, **extra_weight_attrs: Any,
    ) -> None: ...  # fmt: skip

    def get_fused_moe_quant_config(self, layer: Any) -> Any: ...

    def apply(
        self, layer: Any, x: Any, topk_weights: Any, topk_ids: Any, shared_experts: Any,
        shared_experts_input: Any,
    ) -> Any: ...  # fmt: skip


class BaseModelLoader:
    def __init__(self, load_config: Any) -> None:
        self.load_config = load_config

    def download_model(self, model_config: Any) -> None: ...

    def load_weights(self, model: nn.Module, model_config: Any) -> None: ...


class RoutedExperts(nn.Module):
    """Asks for its method as vLLM's own does, and hands it what that does."""

    def __init__(self, prefix: str, config: Any, quant_config: Any, experts: int = 0) -> None:
        super().__init__()
        self.moe_config = SimpleNamespace(num_experts=experts or len(WIDTHS))
        self.quant_method = quant_config.get_quant_method(self, prefix)
        self.quant_method.create_weights(
            layer=self, num_experts=self.moe_config.num_experts, hidden_size=config.hidden_size,
            unpadded_hidden_size=config.hidden_size,
            intermediate_size_per_partition=config.moe_intermediate_size,
            params_dtype=torch.float32, weight_loader=None,
            global_num_experts=self.moe_config.num_experts,
        )  # fmt: skip


class LinearBase(nn.Module):
    pass


class UnquantizedLinearMethod:
    pass


@pytest.fixture
def plugin(monkeypatch) -> Iterator[Any]:
    """Our module, imported where these stand in for vLLM; `known` is what it registered."""
    known: dict[str, dict[str, type]] = {"quantization": {}, "loader": {}}

    def register(kind: str) -> Any:
        return lambda name: lambda cls: known[kind].setdefault(name, cls)

    base = "vllm.model_executor"
    has: dict[str, dict[str, Any]] = {
        "vllm": {}, base: {}, f"{base}.layers": {},
        f"{base}.layers.fused_moe": {
            "FusedMoEMethodBase": FusedMoEMethodBase, "RoutedExperts": RoutedExperts},
        f"{base}.layers.linear": {
            "LinearBase": LinearBase, "UnquantizedLinearMethod": UnquantizedLinearMethod},
        f"{base}.layers.quantization": {"register_quantization_config": register("quantization")},
        f"{base}.layers.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        f"{base}.model_loader": {"register_model_loader": register("loader")},
        f"{base}.model_loader.base_loader": {"BaseModelLoader": BaseModelLoader},
    }  # fmt: skip
    for name, of in has.items():
        module = ModuleType(name)
        vars(module).update(of)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "moecule.vllm_plugin", raising=False)
    found = importlib.import_module("moecule.vllm_plugin")
    yield SimpleNamespace(module=found, known=known)
    sys.modules.pop("moecule.vllm_plugin", None)


@pytest.fixture(scope="module")
def packed(checkpoint, tmp_path_factory) -> dict[str, Path]:
    """Folders with experts of many widths, attention at 4 bits; of qwen3_moe one with an expert less."""
    found = {}
    for name in (*FAMILIES, "dropped"):
        streamed = tiny.stream(
            checkpoint("qwen3_moe" if name == "dropped" else name, tokenizer=True)
        )
        made = tiny.plan(
            streamed,
            lambda i, e, n=name: Drop() if n == "dropped" and e == 1
            else Keep() if WIDTHS[e] == 16 else Keep(WIDTHS[(e + i) % 5], 16),
            rest={"attention": Keep(4, 32)},
            skip=Masks(HOW) if name == "mixtral" else None,  # stays off
        )  # fmt: skip
        found[name] = tmp_path_factory.mktemp(name)
        tiny.write(streamed, made, found[name], tiny.tokens())
    return found


def quantization(plugin: Any, folder: Path) -> Any:
    """What vLLM makes of config.json."""
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    made = plugin.known["quantization"][said["quant_method"]].from_config(said)
    made.maybe_update_config(str(folder), hf_config=None, revision=None)
    return made


def expert_by_expert(module: Any, x: Any, weights: Any, ids: Any) -> Any:
    """The sum over a token's experts of what their unpacked weights give: no kernel, no grouping."""
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for k, e in enumerate(ids[t].tolist()):
            if e < 0:
                continue
            kind, row = module.slots[e]
            stack = module.packed[kind]
            up, down = (
                getattr(stack, f"{n}_weight")[row] if kind == "bits16"
                else packed_of(stack, n, row).dequantize() for n in ("gate_up", "down")
            )  # fmt: skip
            gate, value = (up @ x[t]).chunk(2)
            out[t] += weights[t, k] * (down @ (nn.functional.silu(gate) * value))
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_of_all_widths_give_what_their_weights_give(plugin, packed, name):
    model = tiny.load(packed[name])
    config = model.config
    if name == "mixtral":
        config.moe_intermediate_size = config.intermediate_size
    made = quantization(plugin, packed[name])
    (at, ours), *_ = experts_in(find_layers(model)[1][1])
    layer = RoutedExperts(f"model.layers.1.{at}", config, made)
    assert not list(layer.parameters())  # nothing for vLLM's loaders to miss
    g = torch.Generator().manual_seed(0)
    x = torch.randn(24, config.hidden_size, generator=g)
    ids = torch.stack([torch.randperm(len(WIDTHS), generator=g)[:2] for _ in range(24)])
    weights = torch.rand(24, 2, generator=g)
    ids[3, 1] = -1  # nobody
    with torch.no_grad():
        found = layer.quant_method.apply(layer, x, weights, ids.int(), None, None)
        wanted = expert_by_expert(ours, x, weights, ids)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        whole = ids.clamp(min=0)
        again = layer.quant_method.apply(layer, x, weights, whole.int(), None, None)
        assert torch.equal(again, ours(x, whole, weights))  # as moecule runs it
    kinds = {kind for kind, _ in layer.quant_method.experts.slots}
    assert len(kinds) == 6  # one stack for every width, 16 bits too
    assert isinstance(made.get_quant_method(LinearBase(), "lm_head"), UnquantizedLinearMethod)
    assert made.get_quant_method(nn.Embedding(1, 1), "model.embed_tokens") is None


@pytest.mark.parametrize("name", FAMILIES)
def test_all_else_has_the_names_of_the_familys_own_checkpoints(plugin, packed, name, tmp_path):
    got: dict[str, Any] = {}
    model = nn.Module()
    model.load_weights = lambda weights: got.update(weights)
    loader = plugin.known["loader"]["moecule"](SimpleNamespace(load_format="moecule"))
    config = SimpleNamespace(model=str(packed[name]), dtype=torch.float32)
    loader.download_model(config)
    loader.load_weights(model, config)
    export(packed[name], tmp_path / "stock", "transformers")
    from safetensors.torch import load_file

    wanted = load_file(tmp_path / "stock" / "model.safetensors")
    assert set(got) == {n for n in wanted if ".experts." not in n} and len(got) < len(wanted)
    assert all(torch.equal(t, wanted[n].to(t.dtype)) for n, t in got.items())


def test_what_vllm_would_run_as_something_else_is_refused(plugin, packed, checkpoint):
    config = tiny.load(packed["qwen3_moe"]).config
    made = quantization(plugin, packed["qwen3_moe"])
    with pytest.raises(PlanError, match="holds 8 experts .* vLLM wants 4 .*serve on one GPU"):
        RoutedExperts("model.layers.1.mlp.experts", config, made, experts=4)
    with pytest.raises(PlanError, match="is no layer of experts that moecule packed"):
        RoutedExperts("model.layers.77.mlp.experts", config, made)
    with pytest.raises(PlanError, match="holds 7 experts .*no expert was dropped from"):
        RoutedExperts("model.layers.1.mlp.experts", config, quantization(plugin, packed["dropped"]))
    with pytest.raises(PlanError, match="is a stock checkpoint; serve it without"):
        plugin.module.contents_of(str(checkpoint("mixtral", tokenizer=True)))


def test_signatures_are_those_of_vllm(plugin):
    for ours, base in (
        (plugin.module.PackedExperts, FusedMoEMethodBase),
        (plugin.module.PackedLoader, BaseModelLoader),
    ):
        for name, of in inspect.getmembers(base, inspect.isfunction):
            if name != "__init__":
                mine = inspect.signature(getattr(ours, name)).parameters
                assert list(mine) == list(inspect.signature(of).parameters)


def test_vllm_finds_it_by_its_entry_point(plugin):
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    named = project["entry-points"]["vllm.general_plugins"]["moecule"]
    module, _, function = named.partition(":")
    assert getattr(importlib.import_module(module), function)() is None
    assert set(plugin.known["quantization"]) == set(plugin.known["loader"]) == {"moecule"}
