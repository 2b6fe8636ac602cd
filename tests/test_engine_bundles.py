"""Bundles that are altered, incomplete or hostile: refused before ONNX Runtime sees them, in one sentence."""

import os
import shutil

import numpy as np
import pytest

pytest.importorskip("onnx")
from bundle_factory import GraphWriter, decoder_pull, facts_of, manifest, pack_weights, write_bundle
from tiny import HIDDEN, IMAGE, LATENT, M, P, Twin, make_job, make_nets, null_context, submit_zeros

from rlsd.engine import Engine, Params, RlsdError, Status, native

NETS = make_nets()
GAIN, LOUD = "operator_param saturate gain 1", "named_context loud context.loud.f32"
DECODER, TAKEN = "graph decoder 1 decoder.b1.onnx", ("x", "y", "t", "loss", "grad")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("tiny") / "bundle", NETS)


@pytest.fixture
def bundle(good, tmp_path):
    return shutil.copytree(good, tmp_path / "bundle")


def refused(bundle, words=""):
    with pytest.raises(RlsdError, match=words) as raised:
        Engine(bundle)
    assert raised.value.status == Status.BAD_BUNDLE, raised.value
    assert "\n" not in str(raised.value)
    return str(raised.value)


def resealed(bundle, change=lambda lines: lines):
    """Rewrites the manifest with digests that fit the files, its lines changed."""
    lines = (bundle / "manifest.txt").read_text().splitlines()[1:-1]
    facts = change([line for line in lines if not line.startswith("file ")])
    files = {path.name: path.read_bytes() for path in bundle.iterdir() if path.name != "manifest.txt"}
    (bundle / "manifest.txt").write_bytes(manifest(facts, files))
    return bundle


def test_what_a_bundle_says(good):
    with Engine(good) as engine:
        assert (engine.name, engine.latent_shape, engine.image_shape) == ("tiny", LATENT, IMAGE)
        assert (engine.context_shape, engine.timesteps, engine.feature_dim) == ((2, 3), 120, 5)
        assert engine.operators["inpainting"].params == {"mask": IMAGE}
        assert engine.operators["saturate"].measurement_shape == (6,)
        assert engine.bytes_per_particle > 0 and engine.contexts == ["loud"]
        np.testing.assert_array_equal(engine.context("loud"), 3 * null_context())


def test_every_flipped_bit_is_found(good, tmp_path):
    for file in sorted(good.iterdir()):
        data = bytearray(file.read_bytes())
        for at in {0, len(data) // 3, len(data) - 1}:
            bundle = shutil.copytree(good, tmp_path / f"{file.name}-{at}")
            (bundle / file.name).write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
            refused(bundle, "manifest" if file.name == "manifest.txt" else file.name.replace(".", r"\."))


def test_truncated_longer_and_missing_files(good, tmp_path):
    for file in sorted(good.iterdir()):
        for name, data in (("cut", file.read_bytes()[:-1]), ("longer", file.read_bytes() + b"\n"), ("gone", None)):
            bundle = shutil.copytree(good, tmp_path / f"{file.name}-{name}")
            if data is None:
                (bundle / file.name).unlink()
            else:
                (bundle / file.name).write_bytes(data)
            refused(bundle, "manifest" if file.name == "manifest.txt" else file.name.replace(".", r"\."))


def test_a_manifest_has_a_mebibyte_at_most(bundle):
    lines = "info room\n" * (1 << 17)
    resealed(bundle, lambda facts: [*facts, *lines.splitlines()])
    refused(bundle, r"manifest\.txt: has \d+ bytes, at most 1048576 are allowed")


def test_nothing_but_regular_files(bundle, good):
    for make in (lambda path: path.symlink_to(good / path.name), os.mkfifo, os.mkdir):
        for name in ("weights.bin", "manifest.txt"):
            kept = (bundle / name).read_bytes()
            (bundle / name).unlink()
            make(bundle / name)
            refused(bundle, name)
            (bundle / name).rmdir() if (bundle / name).is_dir() else (bundle / name).unlink()
            (bundle / name).write_bytes(kept)
    Engine(bundle).close()


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("rlsd-bundle 1", "rlsd-bundle 2", "rlsd-bundle 2"),
        ("target cpu", "target cuda", "cotangent_scale decoder"),
        ("target cpu", "target tpu", "tpu.*cpu.*cuda"),
        ("latent 4 2 2", "latent 2 2 3", "2.*2.*3"),
        ("latent 4 2 2", "latent 2 2 -2", "-2"),
        ("latent 4 2 2", "latent 2  2 2", "single space"),
        ("latent 4 2 2", "latent 4294967296 4294967296 4294967296", "the shape has too many elements"),
        ("latent 4 2 2", "latent 99999999999999999999 1 1", "99999999999999999999"),
        ("image 1 4 4", "image 1 4", "image"),
        ("image 1 4 4", "image 16 1 1", "image"),
        ("context 2 3", "context 3 2", "context"),
        ("timesteps 120", "timesteps 121", "alphas_cumprod"),
        ("timesteps 120", "timesteps 0x78", "0x78"),
        ("timesteps 120", "timesteps 120\ntimesteps 120", "timesteps"),
        ("steps_offset 1", "steps_offset 1.5", "1.5"),
        ("steps_offset 1", "colour blue", "colour"),
        ("feature_dim 5", "feature_dim 6", "6"),
        ("alphas_cumprod alphas_cumprod.f64", "alphas_cumprod ../alphas_cumprod.f64", r"\.\./alphas_cumprod.f64"),
        ("weights weights.bin", "weights /etc/passwd", "/etc/passwd"),
        ("weights weights.bin", "weights .hidden", ".hidden"),
        ("weights weights.bin", "weights other.bin", "other.bin"),
        ("graph decoder 1 decoder.b1.onnx", "graph decoder 2 decoder.b1.onnx", "decoder"),
        ("graph decoder 1 decoder.b1.onnx", "graph decoder 0 decoder.b1.onnx", "0"),
        ("graph decoder 1 decoder.b1.onnx", "graph decoder 1 features.b1.onnx", "decoder"),
        ("graph decoder 1 decoder.b1.onnx", "info no decoder", "decoder"),
        ("graph features_pull 1 features_pull.b1.onnx", "info nothing", "features_pull"),
        ("graph operator.saturate.loss 1 operator.saturate.loss.b1.onnx", "info nothing", "saturate"),
        ("operator saturate 6", "operator saturate 7", "saturate"),
        ("operator saturate 6", "info nothing", "saturate"),
        ("operator_param saturate gain 1", "operator_param saturate gein 1", "gain"),
        ("operator_param saturate gain 1", "operator_param saturate gain 1\noperator_param saturate y 6", "'y'"),
        ("operator_param inpainting mask 1 4 4", "operator_param inpainting mask 1 4 5", "mask"),
        ("name tiny", "info nameless", "name"),
        ("latent 4 2 2", "latent 16", "no line 'latent C H W'"),
        ("context 2 3", "info nothing", "no line 'context'"),
        ("null_context null_context.f32", "info nothing", "no line 'null_context'"),
        ("name tiny", "name tiny\nname other", "'name' stands twice"),
        ("operator saturate 6", "operator saturate 6\noperator saturate 6", "operator 'saturate' stands twice"),
        ("operator saturate 6", "operator saturate 1 1 1 1 1 1 6", "a shape has 1 to 6 dimensions"),
        (GAIN, f"{GAIN}\n{GAIN}", "parameter 'gain' of operator 'saturate' stands twice"),
        *((GAIN, f"{GAIN}\noperator_param saturate {taken} 1", f"be called '{taken}'") for taken in TAKEN),
        (LOUD, f"{LOUD}\n{LOUD}", "context 'loud' stands twice"),
        (DECODER, f"{DECODER}\n{DECODER}", "graph 'decoder' for batch 1 stands twice"),
    ],
)
def test_manifests_that_are_wrong_though_sealed(bundle, old, new, words):
    def change(lines):
        assert old in lines or old == "rlsd-bundle 1"
        return "\n".join(new if line == old else line for line in lines).split("\n")

    if old == "rlsd-bundle 1":
        text = (bundle / "manifest.txt").read_bytes().replace(old.encode(), new.encode())
        (bundle / "manifest.txt").write_bytes(text)
        refused(bundle, words)
        return
    resealed(bundle, change)
    try:
        message = refused(bundle, words)
    except pytest.fail.Exception:  # graphs of operators may be opened at the first job that needs them
        with Engine(bundle) as engine, pytest.raises(RlsdError, match=words) as raised:
            for operator in engine.operators:
                submit_zeros(engine, operator)
        assert raised.value.status == Status.BAD_BUNDLE
        message = str(raised.value)
    assert "\n" not in message


def test_a_graph_that_was_refused_is_refused_again(bundle):
    resealed(bundle, lambda lines: [line.replace("operator saturate 6", "operator saturate 7") for line in lines])
    with Engine(bundle) as engine:
        for _ in range(2):
            with pytest.raises(RlsdError, match=r"'y' is float32 1x6, float32 1x7 is needed") as raised:
                submit_zeros(engine, "saturate")
            assert raised.value.status == Status.BAD_BUNDLE


def test_files_that_no_line_names_are_not_read(bundle):
    (bundle / "notes.txt").write_text("not of the bundle")
    os.mkfifo(bundle / "pipe")
    Engine(bundle).close()


def test_a_table_with_impossible_values(bundle):
    for value in (0.0, -1.0, 1.5, np.nan, np.inf):
        table = NETS.abar.copy()
        table[3] = value
        (bundle / "alphas_cumprod.f64").write_bytes(table.tobytes())
        refused(resealed(bundle), "alphas_cumprod")
    table[3] = 1  # no noise at all is possible
    (bundle / "alphas_cumprod.f64").write_bytes(table.tobytes())
    Engine(resealed(bundle)).close()


@pytest.mark.parametrize("file", ["null_context.f32", "context.loud.f32"])
def test_contexts_with_impossible_values(bundle, file):
    """Named ones, too, though the engine itself never reads them."""
    whole = (bundle / file).read_bytes()
    for data, words in (
        (whole[:-4], f"{file}: has 20 bytes, 24 are needed"),
        (whole[:-4] + np.float32(np.nan).tobytes(), f"{file}: has a value that is not finite"),
    ):
        (bundle / file).write_bytes(data)
        refused(resealed(bundle), words)


def test_a_graph_that_is_garbage(bundle):
    (bundle / "decoder.b1.onnx").write_bytes(b"garbage")
    refused(resealed(bundle), "decoder.b1.onnx")


def test_a_graph_cannot_reach_other_files(tmp_path):
    """Weights at a name that the manifest does not give, or past the end of the file, are refused."""
    _, where = pack_weights(NETS)
    for name, change in (("name", (b"weights.bin", b"weights.bim")), ("end", None)):
        beyond = dict(where, V1=(10**6, where["V1"][1])) if change is None else where
        graph = decoder_pull(GraphWriter(NETS, 1, beyond))
        graph = graph.replace(*change) if change else graph
        refused(write_bundle(tmp_path / name, NETS, instead={"decoder_pull": graph}), "decoder_pull.b1.onnx")


def test_a_bundle_without_weights_does_not_find_them_in_the_working_directory(bundle, monkeypatch):
    """Where ONNX Runtime would look for a file that nobody gives it."""
    monkeypatch.chdir(bundle)
    refused(resealed(bundle, lambda lines: [line for line in lines if line != "weights weights.bin"]), r"b1\.onnx")


def test_a_pull_back_that_wants_what_the_decoder_does_not_give(tmp_path):
    writer = GraphWriter(NETS, 1, pack_weights(NETS)[1])
    writer("Add", "nowhere", "z", out="z_cotangent")
    graph = writer.model({"z": LATENT, "nowhere": LATENT, "cotangent": IMAGE}, {"z_cotangent": LATENT})
    bundle = write_bundle(tmp_path / "bundle", NETS, instead={"decoder_pull": graph})
    with pytest.raises(RlsdError, match="nowhere") as raised:
        Engine(bundle)
    assert raised.value.status == Status.BAD_BUNDLE


def test_an_activation_of_two_sizes(tmp_path):
    """The pull-back would read beyond what the decoder writes."""
    g = GraphWriter(NETS, 1, {})
    total = g("ReduceSum", "hidden", g.constant(np.array([1])), keepdims=1)
    g.reshaped(g("MatMul", total, g.constant(np.ones((1, M), np.float32))), LATENT, out="z_cotangent")
    pull = g.model({"cotangent": IMAGE, "hidden": (100000,)}, {"z_cotangent": LATENT})
    bundle = write_bundle(tmp_path / "bundle", NETS, instead={"decoder_pull": pull})
    refused(bundle, "tensor 'decoder.hidden' has .* elements in one graph, and 100000 in another")


def test_a_decoder_that_writes_its_input(tmp_path):
    g = GraphWriter(NETS, 1, {})
    for name, shape in (("image", IMAGE), ("hidden", (HIDDEN,)), ("pixels", (P,)), ("z", (100000,))):
        g("ConstantOfShape", g.constant(np.array([1, *shape])), out=name)
    decoder = g.model({}, {"image": IMAGE, "hidden": (HIDDEN,), "pixels": (P,), "z": (100000,)})
    bundle = write_bundle(tmp_path / "bundle", NETS, instead={"decoder": decoder})
    refused(bundle, "graph 'decoder': its input 'z' is an output")


def test_a_linear_decoder_has_a_pull_back_without_saved_activations(tmp_path):
    nets = make_nets(linear=True)
    with Engine(write_bundle(tmp_path / "bundle", nets, 3)) as engine:
        (result,) = engine.reconstruct([make_job(nets, params=Params(steps=5, gamma=1.0))])
        assert np.isfinite(result.particles).all()


def test_tools(good):
    rng = np.random.default_rng(0)
    with Engine(good) as engine:
        x = rng.standard_normal((5, *IMAGE)).astype(np.float32)
        mask = (rng.random(IMAGE) < 0.5).astype(np.float32)
        np.testing.assert_array_equal(engine.measure("inpainting", x, mask=mask), mask * x)
        assert engine.measure("saturate", x, gain=np.ones(1, np.float32)).shape == (5, 6)
        phi = np.tanh(x.reshape(5, -1) @ NETS.weights["F"])
        np.testing.assert_allclose(engine.features(x), phi, atol=1e-6)
        for words, call in (
            ("zoom", lambda: engine.measure("zoom", x)),
            ("mask", lambda: engine.measure("inpainting", x)),
            ("decider", lambda: engine.evaluate("decider", ["image"], z=x)),
            ("image", lambda: engine.evaluate("features", ["phi"], image=x[:, :, :2])),
            ("image", lambda: engine.evaluate("features", ["phi"], image=np.concatenate([x, x], axis=1))),
            ("dtype", lambda: engine.evaluate("features", ["phi"], image=np.zeros((5, *IMAGE), np.int64))),
        ):
            with pytest.raises(RlsdError, match=words) as raised:
                call()
            assert raised.value.status == Status.INVALID_ARGUMENT


def test_graphs_give_what_they_are_asked_for(good):
    """Each output in its shape, against the formulas."""
    rng = np.random.default_rng(1)
    x, z, phi = (rng.standard_normal((3, *shape)).astype(np.float32) for shape in (IMAGE, LATENT, (5,)))
    job = make_job(NETS, "saturate")
    twin, flat = Twin(NETS, job), x.reshape(3, -1)
    hidden, pixels = (each.astype(np.float32) for each in twin.layers(z.reshape(3, -1)))
    y = np.repeat(job.y[None], 3, 0)
    with Engine(good) as engine:
        pulled = engine.evaluate("decoder_pull", ["z_cotangent"], cotangent=x, hidden=hidden, pixels=pixels)
        spread = engine.evaluate("features_pull", ["image_cotangent"], image=x, cotangent=phi)
        loss = engine.evaluate("operator.saturate.loss", ["loss", "grad"], x=x, y=y, gain=np.full((3, 1), 1.5))
        with pytest.raises(ValueError, match="output 'hidden' of graph 'decoder' has no known shape"):
            engine.evaluate("decoder", ["hidden"], z=z)
    wanted = {
        "z_cotangent": twin.decode_pull(z.reshape(3, -1), flat).reshape(3, *LATENT),
        "image_cotangent": twin.features_pull(flat, phi).reshape(3, *IMAGE),
        "loss": 0.5 * ((twin.measure(flat) - job.y) ** 2).mean(1),
        "grad": twin.data_gradient(flat).reshape(3, *IMAGE),
    }
    for name, value in (pulled | spread | loss).items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-4, atol=1e-5, err_msg=name)
        assert value.shape == wanted[name].shape


def test_a_file_that_changes_while_the_bundle_is_open(bundle):
    """What Python reads later is what the core verified, or nothing."""
    path = bundle / "context.loud.f32"
    with Engine(bundle) as engine:
        path.write_bytes(bytes(path.stat().st_size))
        with pytest.raises(RlsdError, match=r"context\.loud\.f32: was altered") as raised:
            engine.context("loud")
        assert raised.value.status == Status.BAD_BUNDLE
        path.unlink()
        with pytest.raises(RlsdError, match=r"context\.loud\.f32: cannot be read"):
            engine.context("loud")
        with pytest.raises(RlsdError, match=r"'quiet' is named but has no 'file' line"):
            engine.file("quiet")


def test_a_folder_whose_name_is_no_text():
    with pytest.raises(RlsdError, match="nowhere") as raised:
        Engine("/nowhere/\udcff")
    assert raised.value.status == Status.BAD_BUNDLE


def test_libraries_of_cuda_are_wanted_by_a_bundle_or_a_device(bundle, monkeypatch):
    asked = []
    monkeypatch.setattr(native, "preload_cuda", lambda: asked.append(1))
    Engine(bundle).close()
    assert not asked
    with pytest.raises(RlsdError):
        Engine(bundle, device="cuda:x")
    assert len(asked) == 1
    resealed(bundle, lambda lines: ["target cuda" if line == "target cpu" else line for line in lines])
    refused(bundle, "cotangent_scale decoder")
    assert len(asked) == 2


def test_facts_are_lines(good):
    with Engine(good) as engine:
        facts = engine.describe()
    for line in facts_of(NETS, True):
        key, _, value = line.partition(" ")
        assert value in facts[key]
