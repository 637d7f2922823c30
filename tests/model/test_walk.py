"""The block walk equals an ordinary forward and backward pass, with one block's weights at a time."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import UNUSUAL
from support import ARCHITECTURES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, ReformerConfig, ReformerModelWithLMHead, ZayaConfig
from transformers.modeling_outputs import BaseModelOutput

from llmsqueeze.errors import UnsupportedError
from llmsqueeze.measure.moments import fusion_groups
from llmsqueeze.measure.request import Request
from llmsqueeze.measure.sweeps import forward_sweep, head_sweep
from llmsqueeze.model.blockwise.activations import Activations, Spill
from llmsqueeze.model.blockwise.handed import Layout
from llmsqueeze.model.blockwise.recorder import Recorder, Returns, hidden_of, kind_of, others_of
from llmsqueeze.model.blockwise.trace import given_tensors
from llmsqueeze.model.blockwise.walk import Walk
from llmsqueeze.model.checkpoint import open_checkpoint
from llmsqueeze.model.linears import find_blocks
from llmsqueeze.model.skeleton import Skeleton, build_skeleton
from llmsqueeze.progress import Progress

CPU = torch.device("cpu")


@contextmanager
def walking(
    folder: Path, rows: list[Tensor], dtype: torch.dtype, limit: int = 1 << 30, products: torch.dtype | None = None
) -> Iterator[Walk]:
    with Spill(limit) as spill:
        yield Walk(build_skeleton(open_checkpoint(folder)), rows, spill, dtype, CPU, products)


def walk_gradients(walk: Walk) -> tuple[list[float], dict[str, Tensor]]:
    """Each sample's loss and the sum over samples of every linear's weight gradient, as stored."""
    inputs = forward_sweep(walk, walk.embed(), Progress())[0]
    losses, upstream = [], []
    with walk.head.resident():
        for hidden, tokens in zip(inputs[-1].each(CPU), walk.samples, strict=True):
            loss, gradient = walk.head.gradient(hidden, tokens)
            losses.append(loss)
            upstream.append(gradient)
    total: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        total[name] = total.get(name, 0) + gradient

    for index in reversed(range(len(walk.modules))):
        with walk.resident_block(index):
            for s in range(len(walk.samples)):
                upstream[s] = walk.block_gradient(index, s, inputs[index].get(s, CPU), upstream[s], add)
    return losses, total


def ordinary_gradients(folder: Path, rows: list[Tensor], dtype: torch.dtype) -> tuple[list[float], nn.Module]:
    """The same by transformers and one backward pass; the loss in the model's own precision, not cast to float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    losses = []
    for tokens in rows:
        logits = model(input_ids=tokens, use_cache=False).logits
        losses.append(nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]))
    torch.stack(losses).sum().backward()
    return [float(loss.detach()) for loss in losses], model


def largest_difference(walked: dict[str, Tensor], model: nn.Module) -> float:
    pairs = [(gradient, model.get_submodule(name).weight.grad) for name, gradient in walked.items()]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "logits_bytes"),
    [(torch.float64, 1e-9, 1 << 14), (torch.float32, 1e-4, 1 << 26)],
    ids=["float64-sliced", "float32-whole"],
)
def test_gradients_of_the_built_in_model(
    demo_dir: Path, dtype: torch.dtype, tolerance: float, logits_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmsqueeze.model.blockwise.head.LOGITS_BYTES", logits_bytes)
    rows = [torch.randint(5, 300, (1, 50), generator=torch.Generator().manual_seed(s)) for s in range(3)]
    with walking(demo_dir, rows, dtype) as walk:
        losses, walked = walk_gradients(walk)
    expected, model = ordinary_gradients(demo_dir, rows, dtype)
    assert losses == pytest.approx(expected, rel=tolerance)
    assert len(walked) == 7 * model.config.num_hidden_layers
    assert largest_difference(walked, model) < tolerance


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_products_in_bfloat16_are_those_of_linears_alone(
    architecture: str, random_model: Callable[..., Path], rows: list[Tensor]
) -> None:
    """Losses and gradients move by the digits of bfloat16, in the model's float32 pass and in this one alike."""
    folder = random_model(architecture)
    with walking(folder, rows, torch.float32, products=torch.bfloat16) as walk:
        losses, walked = walk_gradients(walk)
    expected, model = ordinary_gradients(folder, rows, torch.float32)
    assert losses == pytest.approx(expected, rel=1e-2)
    assert losses != pytest.approx(expected, rel=1e-6)
    assert 1e-4 < largest_difference(walked, model) < 0.1
    assert all(gradient.dtype == torch.float32 for gradient in walked.values())


@pytest.mark.parametrize("name", ["stories260K", "babyllama-361", "bookllama-6m"])
def test_gradients_of_real_models(shared: Path, name: str) -> None:
    folder = shared / "models" / name
    rows = [torch.randint(5, 360, (1, 40), generator=torch.Generator().manual_seed(s)) for s in range(2)]
    with walking(folder, rows, torch.float64, limit=1 << 14) as walk:
        losses, walked = walk_gradients(walk)
    expected, model = ordinary_gradients(folder, rows, torch.float64)
    assert losses == pytest.approx(expected, rel=1e-9)
    assert largest_difference(walked, model) < 1e-9


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_every_architecture(
    architecture: str, random_model: Callable[..., Path], rows: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmsqueeze.model.blockwise.head.LOGITS_BYTES", 1 << 12)
    folder = random_model(architecture)
    with walking(folder, rows, torch.float64) as walk:
        losses, walked = walk_gradients(walk)
    expected, model = ordinary_gradients(folder, rows, torch.float64)
    assert losses == pytest.approx(expected, rel=1e-9)
    assert largest_difference(walked, model) < 1e-9


@pytest.mark.parametrize("architecture", UNUSUAL)
def test_gradients_of_unusual_blocks(architecture: str, random_model: Callable[..., Path], rows: list[Tensor]) -> None:
    """State spaces compute parts of their forward pass in float32, whatever the model computes in."""
    folder = random_model(architecture)
    with walking(folder, rows, torch.float64) as walk:
        losses, walked = walk_gradients(walk)
        linears = {name for names in walk.skeleton.linears for name in names}
        # what picks indices has no gradient
        assert set(walked) == {name for name in linears if ".indexer." not in name}
    expected, model = ordinary_gradients(folder, rows, torch.float64)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert largest_difference(walked, model) < 1e-5


def test_gradients_through_outputs_that_later_blocks_get(tmp_path: Path, rows: list[Tensor]) -> None:
    """Zaya's routers get what the router of the block before has computed."""
    torch.manual_seed(1)
    config = ZayaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=3,
        vocab_size=96,
        moe_intermediate_size=32,
        num_experts=2,
        router_hidden_size=16,
        max_position_embeddings=64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with walking(tmp_path, rows, torch.float32) as walk:
        losses, walked = walk_gradients(walk)
        attention = {name: gradient for name, gradient in walked.items() if ".self_attn." in name}
        assert [Layout.from_json(one) for one in walk.layouts(1).values()] == 3 * [walk._layouts[1, 0]]
    expected, model = ordinary_gradients(tmp_path, rows, torch.float32)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert largest_difference(attention, model) < 1e-4


def test_the_trace_of_a_block_hands_on_alike_for_all_samples(
    random_model: Callable[..., Path], rows: list[Tensor]
) -> None:
    with walking(random_model("indices handed on"), rows, torch.float32) as walk:
        inputs = walk.embed()
        with walk.resident_block(0), torch.no_grad():
            trace = walk.trace(0, inputs)
            assert trace is not None
            assert len(walk.layouts(1)) == len(rows)
            traced = trace.run(inputs.get(1, CPU), given_tensors(walk.call(0, 1)), walk.linear)
            assert torch.allclose(traced, walk.run(0, 1, inputs.get(1, CPU)), atol=1e-5)
        assert walk.hidden_in(1, 1, traced).numel() < traced.numel(), "the indices lie behind the hidden states"


@pytest.mark.parametrize(
    "architecture", ["narrow embeddings", "scaled in place", "stacked streams, keys handed on", "llama"]
)
def test_gradients_at_the_embeddings(architecture: str, random_model: Callable[..., Path], rows: list[Tensor]) -> None:
    """They are those of the model's own backward pass at what its embeddings give."""
    folder = random_model(architecture)
    tokens = torch.arange(24)[None] + 5
    with walking(folder, [tokens], torch.float64) as walk:
        inputs = forward_sweep(walk, walk.embed(), Progress())[0]
        with walk.head.resident():
            _, gradient = walk.head.gradient(inputs[-1].get(0, CPU), tokens)
        for index in reversed(range(len(walk.modules))):
            with walk.resident_block(index):
                gradient = walk.block_gradient(index, 0, inputs[index].get(0, CPU), gradient)
        with walk.resident_outside():
            given, at_embeddings = walk.embedding_gradient(0, gradient)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    seen: list[Tensor] = []

    def see(_module: nn.Module, _args: object, rows: Tensor) -> Tensor:
        rows.retain_grad()
        seen.append(rows)
        return rows.clone()  # one of these models writes over it

    model.get_input_embeddings().register_forward_hook(see)
    logits = model(input_ids=tokens, use_cache=False).logits
    nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).backward()
    assert given.shape == at_embeddings.shape == seen[0].shape
    torch.testing.assert_close(given, seen[0].detach())
    torch.testing.assert_close(at_embeddings, seen[0].grad)


def test_each_stream_hands_on_its_own_keys(random_model: Callable[..., Path], rows: list[Tensor]) -> None:
    """Blocks 2 and 3 attend to the keys and values of blocks 0 and 1: those of the same stream, of the same sample."""
    folder = random_model("stacked streams, keys handed on")
    with walking(folder, rows, torch.float64) as walk, torch.no_grad():
        streams = [walk.embed(), walk.embed()]
        for index in range(len(walk.modules)):
            with walk.resident_block(index):
                halved = {name: walk.skeleton.linear(name).weight * 0.5 for name in walk.skeleton.linears[index]}
                for number, weights in enumerate(({}, halved)):
                    with walk.skeleton.using(weights):
                        streams[number] = walk.through(index, streams[number])
        names = {f"{name}.weight" for linears in walk.skeleton.linears for name in linears}
        with walk.head.resident():
            walked = [[walk.head.final_norm(hidden) for hidden in stream.each(CPU)] for stream in streams]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    for stream in walked:
        for tokens, hidden in zip(rows, stream, strict=True):
            with torch.no_grad():
                expected = model.model(input_ids=tokens, use_cache=False).last_hidden_state
            torch.testing.assert_close(hidden, expected, rtol=1e-6, atol=1e-6)
        for name in names:  # for the second
            model.get_parameter(name).data *= 0.5


def test_forward_is_bit_equal(demo_dir: Path) -> None:
    tokens = torch.randint(5, 300, (1, 60))
    with walking(demo_dir, [tokens], torch.float32) as walk:
        last = forward_sweep(walk, walk.embed(), Progress())[0][-1].get(0, CPU)
        with walk.head.resident():
            normed = walk.head.final_norm(last)
    model = AutoModelForCausalLM.from_pretrained(demo_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(normed.detach(), model.model(input_ids=tokens, use_cache=False).last_hidden_state)


def test_only_one_block_is_ever_resident(demo_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Watches every tensor that becomes real, through a whole forward and backward sweep."""
    real: dict[str, int] = {}
    most = 0
    original = Skeleton._place

    def watched(self: Skeleton, name: str, tensor: Tensor | None) -> None:
        nonlocal most
        original(self, name, tensor)
        real.pop(name, None)
        if tensor is not None:
            real[name] = tensor.numel()
            blocks = {".".join(n.split(".")[:3]) for n in real if ".layers." in n}
            outside = any(".layers." not in n for n in real)
            assert len(blocks) + outside <= 1, f"{sorted(real)} are resident together"
        most = max(most, sum(real.values()))

    monkeypatch.setattr(Skeleton, "_place", watched)
    with walking(demo_dir, [torch.randint(5, 300, (1, 20))], torch.float32) as walk:
        walk_gradients(walk)
        model = walk.skeleton.model
        largest = max(sum(p.numel() for p in module.parameters()) for module in walk.modules)
        assert most == largest
        assert all(p.is_meta for p in model.parameters()), "everything is released again"


def test_activations_spill_and_come_back(tmp_path: Path) -> None:
    tensors = [torch.randn(3, 5), torch.arange(7), torch.randn(4).to(torch.bfloat16), torch.randn(2, 2)[:, :1]]
    with Spill(limit=100, parent=tmp_path) as spill:
        kept = Activations(spill)
        for tensor in tensors:
            kept.append(tensor)
        assert spill.nbytes <= 100
        assert spill.on_disk > 0
        assert all(torch.equal(a, b) for a, b in zip(kept.each(CPU), tensors, strict=True))
        kept.replace(0, torch.ones(2))
        assert torch.equal(kept.get(0, CPU), torch.ones(2))
        kept.clear()
        assert spill.nbytes == 0
    assert list(tmp_path.iterdir()) == []


def test_a_released_place_on_disk_is_taken_again() -> None:
    """Every size has places of its own; a tensor is never written over one that is still needed."""
    with Spill(limit=0) as spill:
        kept = Activations(spill)
        for value in range(4):
            kept.append(torch.full((5,), float(value)))
        kept.append(torch.arange(3))
        size = spill.on_disk
        kept.release(1)
        kept.release(4)
        kept.append(torch.full((5,), 9.0))
        kept.replace(0, torch.full((5,), 8.0))
        kept.append(torch.arange(3) + 1)
        assert spill.on_disk == size
        assert [kept.get(i, CPU)[0].item() for i in (0, 2, 3, 5, 6)] == [8.0, 2.0, 3.0, 9.0, 1]


def test_spilling_changes_nothing(demo_dir: Path) -> None:
    rows = [torch.randint(5, 300, (1, 30)) for _ in range(2)]
    results = []
    for limit in (1 << 30, 0):
        with walking(demo_dir, rows, torch.float32, limit) as walk:
            results.append(walk_gradients(walk)[1])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_head_sweep_reports_the_models_loss(demo_dir: Path) -> None:
    rows = [torch.randint(5, 300, (1, 30)) for _ in range(2)]
    with walking(demo_dir, rows, torch.float32) as walk:
        outputs = forward_sweep(walk, walk.embed(), Progress())[0][-1]
        loss, gradients = head_sweep(walk, outputs, Request(labels="text"), Progress())
        assert len(gradients) == 2
    expected, _ = ordinary_gradients(demo_dir, rows, torch.float32)
    assert loss == pytest.approx(sum(expected) / 2, rel=1e-5)


EXPECTED_GROUPS = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "neox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
}


@pytest.mark.parametrize("architecture", EXPECTED_GROUPS)
def test_fusion_groups_by_identity_of_the_input(
    architecture: str, random_model: Callable[..., Path], rows: list[Tensor]
) -> None:
    with walking(random_model(architecture), rows, torch.float32) as walk:
        inputs = walk.embed()
        with walk.resident_block(1):
            groups = fusion_groups(walk, 1, inputs.get(0, CPU))
    names = [sorted(name.split(".")[-1] for name in group.names) for group in groups]
    assert sorted(names) == sorted(sorted(names) for names in EXPECTED_GROUPS[architecture])
    assert all(group.calls == 1 for group in groups)


def test_overrides_nest_and_end(demo_dir: Path) -> None:
    skeleton = build_skeleton(open_checkpoint(demo_dir))
    name = "model.norm.weight"
    stored, one, two = skeleton.read(name), torch.ones(1), torch.full((1,), 2.0)
    with skeleton.overriding({name: one}):
        assert torch.equal(skeleton.read(name), one)
        with skeleton.overriding({name: lambda: two}):
            assert torch.equal(skeleton.read(name), two)
        assert torch.equal(skeleton.read(name), one)
    assert torch.equal(skeleton.read(name), stored)


def test_the_outermost_list_with_most_weights_are_the_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(2) for _ in range(2))
            self.mixed = nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2), nn.ReLU(), nn.ReLU()])
            self.decoder = nn.ModuleList(Block() for _ in range(3))

    assert find_blocks(Model()) == ["decoder.0", "decoder.1", "decoder.2"]
    with pytest.raises(UnsupportedError, match="no list of decoder blocks"):
        find_blocks(nn.Linear(2, 2))


def test_work_between_blocks_is_refused(demo_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that changes the hidden states between its blocks cannot be walked."""
    with walking(demo_dir, [torch.randint(5, 300, (1, 8))], torch.float32) as walk:
        layers = walk.skeleton.model.model.layers
        call = type(layers[1]).__call__

        def doubled(self: nn.Module, hidden: Tensor, *args: object, **kwargs: object) -> object:
            return call(self, hidden * 2 if self is layers[1] else hidden, *args, **kwargs)

        monkeypatch.setattr(type(layers[1]), "__call__", doubled)
        with pytest.raises(UnsupportedError, match="changes the hidden states between decoder blocks 0 and 1"):
            walk.embed()


def test_what_only_chooses_stays_as_it_is(random_model: Callable[..., Path]) -> None:
    """The indexer of sparse attention gives the numbers of tokens, and nothing else."""
    skeleton = build_skeleton(open_checkpoint(random_model("indices handed on")))
    inside = [name for name, module in skeleton.model.named_modules() if isinstance(module, nn.Linear)]
    left = {name for name in inside if name.startswith("model.layers.")} - set(skeleton.all_linears)
    assert {name.rpartition(".")[2] for name in left} == {"wq_b", "wk", "weights_proj"}
    assert all(".indexer." in name for name in left)


@pytest.fixture
def reversible(tmp_path: Path) -> Path:
    """Reformer's reversible layers give two streams, which the model exchanges; their backward pass is their own."""
    sizes = {"hidden_size": 32, "attention_head_size": 16, "num_attention_heads": 2, "feed_forward_size": 32}
    kinds = {"attn_layers": ["local", "local"], "is_decoder": True, "axial_pos_embds": False}
    dropped = {"hidden_dropout_prob": 0.5, "local_attention_probs_dropout_prob": 0.5}
    lengths = {"local_attn_chunk_length": 8, "max_position_embeddings": 64}
    ReformerModelWithLMHead(ReformerConfig(vocab_size=320, **sizes, **kinds, **dropped, **lengths)).save_pretrained(
        tmp_path
    )
    return tmp_path


def test_two_streams_are_refused(reversible: Path) -> None:
    with (
        walking(reversible, [torch.randint(5, 300, (1, 8))], torch.float32) as walk,
        pytest.raises(UnsupportedError, match="changes the hidden states between decoder blocks 0 and 1"),
    ):
        walk.embed()


def test_gradients_of_a_backward_pass_for_training_alone(reversible: Path) -> None:
    """They are those of the model in training, in which nothing is dropped out."""
    tokens, off = torch.arange(5, 13)[None], {"hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0}
    with Spill() as spill:
        skeleton = build_skeleton(open_checkpoint(reversible)).enclosed()
        assert skeleton.blocks == ["reformer.encoder"]
        _, walked = walk_gradients(Walk(skeleton, [tokens], spill, torch.float64, CPU))
    model = AutoModelForCausalLM.from_pretrained(reversible, dtype=torch.float64, **off).train()
    logits = model(input_ids=tokens).logits
    nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]).backward()
    assert len(walked) == len(skeleton.linears[0])
    assert largest_difference(walked, model) < 1e-6
    assert not any(module.training for module in skeleton.model.modules())


ZEROS, Named = torch.zeros(2), namedtuple("Named", ["hidden", "other"])


@pytest.mark.parametrize(
    "output",
    [[torch.zeros(2), 1], (torch.zeros(2), 1), Named(torch.zeros(2), 1), BaseModelOutput(torch.zeros(2), (1,))],
)
def test_what_stands_for_a_block_returns_what_it_does(output: Any) -> None:
    like = Returns.of(output).holding(torch.ones(2))
    assert type(like) is type(output)
    assert torch.equal(hidden_of(like), torch.ones(2))
    assert others_of(like) == others_of(output) == [1]


def test_what_a_block_gets_of_earlier_blocks_is_refused_also_if_the_model_computes_it() -> None:
    class Block(nn.Module):
        def forward(self, hidden: Tensor, _earlier: Tensor) -> Tensor:
            return hidden

    def run(blocks: Sequence[nn.Module], hidden: Tensor) -> None:
        earlier = torch.zeros(0, *hidden.shape)
        for block in blocks:
            new = block(hidden, earlier)
            earlier, hidden = torch.cat([earlier, hidden[None]]), new

    for count in (2, 3):  # the second block gets what the embeddings gave, which does not change
        blocks = [Block() for _ in range(count)]
        recorder = Recorder(blocks, {kind_of(blocks[0]): Returns()})
        with recorder.installed(), torch.enable_grad():
            if count == 2:
                run(blocks, torch.ones(1, 4, 8))
                continue
            with pytest.raises(UnsupportedError, match="block 2 gets more than the hidden states"):
                run(blocks, torch.ones(1, 4, 8))
