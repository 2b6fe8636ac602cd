"""Bundles for CUDA that are wrong, each refused with one sentence that names what; and kernels for several devices.

Every case alters one fact of a good bundle and seals it again, so that nothing but the fact is wrong.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
import onnx
from bundle_factory import write_bundle
from corrupted_bundles import lines_of, seal
from device_case import NETS, PARAMS, fake_fixture  # noqa: F401
from hosted import hosted_bundle
from tiny import make_job

from rlsd.engine import Engine, Params, RlsdError, Status

JOB = make_job(NETS, particles=3, params=Params(gamma=2.0, **{**PARAMS, "steps": 3}))


@pytest.fixture(name="cpu", scope="module")
def cpu_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("tiny") / "cpu", NETS, 1)


@pytest.fixture(name="altered")
def altered_fixture(cpu, tmp_path) -> Path:
    """A good bundle, before it is altered."""
    return hosted_bundle(cpu, tmp_path / "cuda")


def refused(bundle: Path, words: str, status: Status = Status.BAD_BUNDLE) -> None:
    """On opening, or by the first job; a second job is refused alike."""
    for _ in range(2):
        with pytest.raises(RlsdError, match=words) as raised, Engine(bundle) as engine:
            with pytest.raises(RlsdError, match=words):
                engine.reconstruct([JOB])
            engine.reconstruct([JOB])
        assert raised.value.status == status


START = "kernel start 90 start.sm_90.cubin start_kernel 4 1024"
LINES = [
    (f"{START} whole:*i32", "takes a name, an architecture, a file, an entry, warps, bytes and arguments"),
    (f"{START} whole:*i32 BLOCK", "'BLOCK' is neither name:type nor NAME=value"),
    (f"{START} whole:*i32 BLOCK=much", "'much' is not a whole number"),
    (f"{START.replace(' 4 1024', ' 33 1024')} whole:*i32 BLOCK=1", "'33' is not a whole number from 1 to 32"),
    (f"{START} whole:*i32 BLOCK=1", "kernel 'start' stands twice"),
    ("cotangent_scale decoder 2.0", "the scale of 'decoder' stands twice"),
    ("cotangent_scale encoder -1", "'-1' is not a positive number"),
    ("cotangent_scale encoder 0", "'0' is not a positive number"),
    ("cotangent_scale encoder 1e30", "'1e30' is not a positive number"),
    ("cotangent_scale encoder 1.0x", "'1.0x' is not a positive number"),
    ("cotangent_scale encoder nan", "'nan' is not a positive number"),
    ("target tpu", "'target' stands twice"),
]


@pytest.mark.parametrize("line, words", LINES)
def test_lines_that_are_wrong(fake, altered, line, words):
    seal(altered, [*lines_of(altered), line])
    refused(altered, rf"manifest line \d+: .*{words}")


CHANGES = [
    (r"cotangent_scale decoder .*\n", "", "has no line 'cotangent_scale decoder'"),
    (r"cotangent_scale features .*\n", "", "has no line 'cotangent_scale features'"),
    ("target cuda", "target tpu", "the bundle is for target 'tpu'; this engine runs targets 'cpu' and 'cuda'"),
    ("latent 4 2 2", "latent 4 2 1", "latents or images of 8 values: on a GPU they must be multiples of 16"),
    ("image 1 4 4", "image 1 4 5", "latents or images of 20 values"),
    ("image 1 4 4", "image 1 65536 32768", "latents or images of 2147483648 values: .* less than 2\\^31"),
    (r"kernel start .*\n", "", "the bundle has no kernel 'start'"),
    (r"(kernel start .*) BLOCK=\d+", r"\1", "kernel 'start' has no constant 'BLOCK'"),
    (r"(kernel start .* BLOCK=)\d+", r"\g<1>0", "kernel 'start': BLOCK is 0, at least 1 is needed"),
    (r"(kernel start .*) \w+:\S+ (\w+:\S+ \w+:\S+ )", r"\1 \2", "kernel 'start' takes other arguments than the engine"),
    (r"(kernel start .* )(\w+):\*fp32", r"\1\2:*fp32 \2:i32", "kernel 'start' takes other arguments than the engine"),
    (r"(kernel start .* )size:i32 ", r"\1size:fp32 ", "kernel 'start' takes other arguments than the engine"),
    (r"(kernel start .* )size:i32 ", r"\1size:fp64 ", "kernel 'start' takes other arguments than the engine"),
]


@pytest.mark.parametrize("pattern, text, words", CHANGES)
def test_facts_that_are_wrong(fake, altered, pattern, text, words):
    facts = "\n".join(lines_of(altered)) + "\n"
    changed = re.sub(pattern, text, facts)
    assert changed != facts
    seal(altered, changed.splitlines())
    refused(altered, words)


def test_a_kernel_that_is_not_in_its_file(fake, altered):
    seal(altered, [re.sub(" start_kernel ", " begin_kernel ", line) for line in lines_of(altered)])
    refused(altered, "cannot load kernel start: CUDA_ERROR_NOT_FOUND", Status.RUNTIME_ERROR)
    assert fake.count("cuModuleUnload") == fake.count("cuModuleLoadData") > 0


@pytest.mark.parametrize("capability, wanted", [((8, 0), 80), ((8, 7), 86), ((8, 9), 89)])
def test_the_newest_kernel_that_runs_here_is_taken(fake, cpu, tmp_path, capability, wanted):
    """Of the device's major version, and not newer than the device: the files of all others are no kernels."""
    path = hosted_bundle(cpu, tmp_path / "cuda", arch=80)
    facts = [line for line in lines_of(path) if not line.startswith("kernel start ")]
    (start,) = (line.split() for line in lines_of(path) if line.startswith("kernel start "))
    contents = (path / start[3]).read_bytes()
    (path / start[3]).unlink()
    for arch in (90, 80, 89, 86):
        right = contents.replace(b"start 80 ", b"start %d " % arch)
        (path / f"start.{arch}").write_bytes(right if arch == wanted else b"no kernel")
        facts.append(" ".join([*start[:2], str(arch), f"start.{arch}", *start[4:]]))
    seal(path, facts)
    fake.set_capability(*capability)
    with Engine(path) as engine:
        (result,) = engine.reconstruct([JOB])
    assert np.isfinite(result.particles).all()


@pytest.mark.parametrize("capability, arch", [((10, 3), 100), ((9, 0), 80), ((8, 0), 86)])
def test_a_kernel_for_another_device_is_none(fake, cpu, tmp_path, capability, arch):
    """From 9.0 on Triton compiles for one device's own instructions, which a later one of the same major may lack."""
    path = hosted_bundle(cpu, tmp_path / "cuda", arch=arch)
    fake.set_capability(*capability)
    with (
        Engine(path) as engine,
        pytest.raises(RlsdError, match=f"export it with --arch {10 * capability[0] + capability[1]}"),
    ):
        engine.reconstruct([JOB])


def edit(bundle: Path, graph: str, change) -> None:
    """Changes the files of a graph, for every batch."""
    for path in bundle.glob(f"{graph}.b*.onnx"):
        model = onnx.load(path, load_external_data=False)
        change(model.graph)
        path.write_bytes(model.SerializeToString())
    seal(bundle, lines_of(bundle))


@pytest.mark.parametrize("offset", [1 << 20, -64])
def test_a_weight_beyond_the_end_of_its_file(fake, altered, offset):
    """Its first value lies beyond it, or only its last ones."""
    end = (altered / "weights.bin").stat().st_size

    def move(graph) -> None:
        tensor = next(each for each in graph.initializer if each.data_location == onnx.TensorProto.EXTERNAL)
        for entry in tensor.external_data:
            if entry.key == "offset":
                entry.value = str(end + offset)

    edit(altered, "decoder", move)
    refused(altered, "weight '.*' lies beyond the end of weights.bin")


def test_a_weight_whose_place_is_no_number(fake, altered):
    def spoil(graph) -> None:
        tensor = next(each for each in graph.initializer if each.data_location == onnx.TensorProto.EXTERNAL)
        next(entry for entry in tensor.external_data if entry.key == "offset").value = "64x"

    edit(altered, "decoder", spoil)
    refused(altered, "a model says that its weights lie at '64x'")


def packed(model: onnx.ModelProto) -> bytes:
    """The model with each shape as one field, as proto3's encoders write it; onnx has a field for each dimension."""

    def number(value: int) -> bytes:
        return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + number(value >> 7)

    def field(key: int, content: bytes) -> bytes:
        return bytes([key << 3 | 2]) + number(len(content)) + content

    tensors = b""
    for tensor in model.graph.initializer:
        shape = field(1, b"".join(map(number, tensor.dims))) if tensor.dims else b""
        tensor.ClearField("dims")
        tensors += field(5, shape + tensor.SerializeToString())
    model.graph.ClearField("initializer")
    graph = model.graph.SerializeToString() + tensors
    model.ClearField("graph")
    return model.SerializeToString() + field(7, graph)


def test_shapes_in_the_other_encoding(fake, altered):
    with Engine(altered) as engine:
        (wanted,) = engine.reconstruct([JOB])
    for path in altered.glob("*.onnx"):
        path.write_bytes(packed(onnx.load(path, load_external_data=False)))
    seal(altered, lines_of(altered))
    with Engine(altered) as engine:
        (found,) = engine.reconstruct([JOB])
    assert found.particles.tobytes() == wanted.particles.tobytes()


def test_graphs_that_hold_their_weights_themselves(fake, altered):
    """A bundle without a file of weights."""
    with Engine(altered) as engine:
        (wanted,) = engine.reconstruct([JOB])
    for path in altered.glob("*.onnx"):
        path.write_bytes(onnx.load(path).SerializeToString())
    (altered / "weights.bin").unlink()
    seal(altered, [line for line in lines_of(altered) if not line.startswith("weights ")])
    with Engine(altered) as engine:
        (found,) = engine.reconstruct([JOB])
    assert found.particles.tobytes() == wanted.particles.tobytes()


def tensor_info(name: str, size: int) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, [size])


def ask_for(graph, size: int) -> None:
    """One more input, which the graph does not use."""
    graph.input.append(tensor_info("more", size))


def give(graph, size: int) -> None:
    graph.initializer.append(onnx.numpy_helper.from_array(np.ones(size, np.float16), "ones"))
    graph.node.append(onnx.helper.make_node("Identity", ["ones"], ["more"]))
    graph.output.append(tensor_info("more", size))


def test_an_activation_that_nothing_provides(fake, altered):
    edit(altered, "decoder_pull", lambda graph: ask_for(graph, 3))
    refused(altered, "graph 'decoder_pull': nothing provides its input 'more'")


def test_an_activation_of_two_sizes(fake, altered):
    edit(altered, "decoder", lambda graph: give(graph, 3))
    edit(altered, "decoder_pull", lambda graph: ask_for(graph, 4))
    words = "tensor 'decoder.more' is float16 of 3 elements in one graph, and float16 of 4 in another"
    refused(altered, words)


def graph_of_contexts(bundle: Path, out: str, facts: list[str]) -> None:
    """Adds a graph `context` that hands it on as `out`."""
    for batch in (1,):
        ends = [
            onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT16, [batch, 2, 3]) for n in ("context", out)
        ]
        graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["context"], [out])], "g", ends[:1], ends[1:])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
        (bundle / f"context.b{batch}.onnx").write_bytes(model.SerializeToString())
        facts = [*facts, f"graph context {batch} context.b{batch}.onnx"]
    seal(bundle, facts)


def test_a_graph_of_contexts_without_a_context(fake, altered):
    facts = [line for line in lines_of(altered) if not line.startswith(("context ", "null_context ", "named_context "))]
    graph_of_contexts(altered, "keys", facts)
    refused(altered, "the manifest has no line 'context'")


@pytest.mark.parametrize(
    "out, size, words", [("keys", 99, "tensor 'keys' is float16 of"), ("values", 6, "does not give 'keys'")]
)
def test_keys_that_the_graph_of_contexts_does_not_give(fake, altered, out, size, words):
    graph_of_contexts(altered, out, lines_of(altered))
    keys = onnx.helper.make_tensor_value_info("keys", onnx.TensorProto.FLOAT16, [1, size])
    edit(altered, "denoiser", lambda graph: graph.input.append(keys))
    refused(altered, words)


LATER_GRAPH_REFUSED = """
import sys
from rlsd.engine import Engine, RlsdError
try:
    Engine(sys.argv[1])
except RlsdError as error:
    print(error)
"""


def test_a_graph_that_is_refused_after_one_of_our_operators_was_made(fake, altered):
    """The session of the decoder goes before the operators that it refers to: freed memory is overwritten here."""

    def with_operator(graph):
        for name, shape in (("rows", (1, 16)), ("row", (16,))):
            graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))
        graph.node.append(onnx.helper.make_node("BiasResidual", ["rows", "row"], ["more"], domain="rlsd"))
        graph.output.append(onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, [1, 16]))

    for path in altered.glob("decoder.b*.onnx"):
        model = onnx.load(path, load_external_data=False)
        with_operator(model.graph)
        model.opset_import.append(onnx.helper.make_opsetid("rlsd", 1))
        path.write_bytes(model.SerializeToString())
    (altered / "denoiser.b1.onnx").write_bytes((altered / "decoder.b1.onnx").read_bytes())
    seal(altered, lines_of(altered))
    run = subprocess.run(
        [sys.executable, "-c", LATER_GRAPH_REFUSED, str(altered)],
        env={**os.environ, "MALLOC_PERTURB_": "165", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "graph 'denoiser'" in run.stdout, run.stderr
