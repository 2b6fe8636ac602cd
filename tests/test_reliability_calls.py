"""Calls and bundles at the border of what is allowed: each takes a branch of the core that nothing else takes."""

import ctypes as c
import dataclasses

import numpy as np
import pytest

pytest.importorskip("onnx")
import onnx
from bundle_factory import GraphWriter, make_graphs, pack_weights, write_bundle
from corrupted_bundles import lines_of, seal
from tiny import HIDDEN, IMAGE, LATENT, M, P, make_job, make_nets

from rlsd.engine import Engine, Params, RlsdError, Status, library_path, native
from rlsd.engine.native import library

NETS = make_nets()


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle", NETS, 2)


def refused(call, words, status=Status.INVALID_ARGUMENT):
    with pytest.raises(RlsdError, match=words) as raised:
        call()
    assert raised.value.status == status


@pytest.mark.parametrize("device", ["cuda:", "cuda:x", "cuda:-1", "cuda:0x", "cuda:99999999999", "CPU"])
def test_devices_that_are_none(bundle, device):
    refused(lambda: Engine(bundle, device=device), "allowed is cpu")


@pytest.mark.parametrize("name, value", [("threads", 1025), ("threads", -1), ("max_particles", -1)])
def test_options_out_of_range(bundle, name, value):
    refused(lambda: Engine(bundle, **{name: value}), f"{name} is {value}, allowed is 0")


def test_a_library_that_is_not_onnxruntime(bundle):
    refused(lambda: Engine(bundle, onnxruntime=str(library_path())), "OrtGetApiBase", Status.NO_RUNTIME)


def test_onnxruntime_where_the_environment_says(bundle, monkeypatch):
    monkeypatch.setattr(native, "find_onnxruntime", lambda: None)
    monkeypatch.setenv("RLSD_ONNXRUNTIME", "/nonexistent")
    refused(lambda: Engine(bundle), "cannot load ONNX Runtime", Status.NO_RUNTIME)


def test_the_log_says_what_is_open(bundle):
    said = []
    Engine(bundle, log=said.append).close()
    assert len(said) == 1 and said[0].startswith("bundle 'tiny', ONNX Runtime ")


def test_null_and_numbers_that_are_too_large(bundle):
    lib, left, numbers = library(), c.c_int64(7), (c.c_float * 4)()
    assert lib.rlsd_tick(None, left) == Status.INVALID_ARGUMENT and left.value == 0
    assert lib.rlsd_engine_describe(None) == b""
    for n, d in ((2**24 + 1, 1), (1, 2**28 + 1), (-1, 1), (1, 0)):
        given = (numbers, c.c_int64(n), c.c_int64(d), c.c_uint64(0), c.c_uint32(0), c.c_uint32(0), numbers, None)
        assert lib.rlsd_repulsion_gradient(*given) == Status.INVALID_ARGUMENT
    for phi, g in ((None, numbers), (numbers, None)):
        assert lib.rlsd_repulsion_gradient(phi, 1, 4, 0, 0, 0, g, None) == Status.INVALID_ARGUMENT
    params = native.ParamsStruct()
    assert lib.rlsd_params_init(params, c.c_size_t(1 << 20)) == Status.INVALID_ARGUMENT
    assert lib.rlsd_engine_stats(None, native.StatsStruct()) == Status.INVALID_ARGUMENT
    with Engine(bundle) as engine:
        assert lib.rlsd_engine_stats(engine._pointer, None) == Status.INVALID_ARGUMENT
        handle = engine.submit(make_job(NETS, params=Params(steps=3)))
        assert handle.info().seconds == 0
        assert lib.rlsd_job_query(handle._pointer, None) == Status.INVALID_ARGUMENT
        handle.release()
        for arguments in ((None, c.c_size_t(1), None, c.c_size_t(0)), (None, c.c_size_t(0), None, c.c_size_t(1))):
            status = lib.rlsd_evaluate(engine._pointer, b"decoder", c.c_int64(1), *arguments)
            assert status == Status.INVALID_ARGUMENT
        refused(lambda: engine.evaluate("decoder", ["image"], z=np.zeros((0, *LATENT), np.float32)), "count is 0")


def test_tensors_without_a_name_or_data(bundle):
    """Of a C program: none is taken for another, and nothing is written."""
    lib, numbers = library(), (c.c_float * 16)(*[7] * 16)
    z, image, nothing, nameless = (
        native.TensorStruct(name, data, 16, 1)
        for name, data in ((b"z", c.addressof(numbers)), (b"image", c.addressof(numbers)), (b"z", None),
                           (None, c.addressof(numbers)))
    )  # fmt: skip
    many = lambda *tensors: (native.TensorStruct * len(tensors))(*tensors)  # noqa: E731
    with Engine(bundle) as engine:
        for inputs, outputs, words in (
            (many(nothing), many(image), b"'z' has no data"),
            (many(nameless), many(image), b"needs input 'z'"),
            (many(z), many(nameless), b"has no output ''"),
            (many(z), many(native.TensorStruct(b"image", None, 16, 1)), b"'image' has no data"),
            (many(z), many(native.TensorStruct(b"image", c.addressof(numbers), 16, 2)), b"'image' has dtype 2, 1 is"),
        ):
            given = (engine._pointer, b"decoder", 1, inputs, len(inputs), outputs, len(outputs))
            assert lib.rlsd_evaluate(*given) == Status.INVALID_ARGUMENT
            assert words in lib.rlsd_last_error()
        assert set(numbers) == {7.0}
        assert lib.rlsd_evaluate(engine._pointer, b"decoder", 1, many(nameless, z), 2, many(image), 1) == Status.OK
        assert 7.0 not in numbers


def test_samples_that_do_not_fill_the_last_batch(bundle):
    """3 of batches of 2: nothing is written behind them."""
    numbers, z = np.full((4, *IMAGE), 7, np.float32), np.random.default_rng(0).standard_normal((3, *LATENT), np.float32)
    with Engine(bundle) as engine:
        given = (
            native.TensorStruct(b"z", z.ctypes.data, z.size, 1),
            native.TensorStruct(b"image", numbers.ctypes.data, 48, 1),
        )
        assert library().rlsd_evaluate(engine._pointer, b"decoder", 3, given[0], 1, given[1], 1) == Status.OK
        for i in range(3):
            np.testing.assert_array_equal(numbers[i], engine.evaluate("decoder", ["image"], z=z[i : i + 1])["image"][0])
    assert (numbers[3] == 7).all()


def test_a_network_can_be_evaluated_at_timesteps(bundle):
    z, context = np.ones((3, *LATENT), np.float32), np.zeros((3, 2, 3), np.float32)
    with Engine(bundle) as engine:
        eps = engine.evaluate("denoiser", ["eps"], z_t=z, t=np.array([0, 5, 119]), context=context)["eps"]
        assert np.isfinite(eps).all() and not np.array_equal(eps[0], eps[1])
        late = {"z_t": z, "t": np.array([0, 5, 120]), "context": context}
        refused(lambda: engine.evaluate("denoiser", ["eps"], **late), "indices", Status.RUNTIME_ERROR)
        real = {"z_t": z, "t": np.array([0.0, 5.0, 119.0]), "context": context}
        refused(lambda: engine.evaluate("denoiser", ["eps"], **real), "'t' has dtype 1, 2 is needed")


def test_a_request_to_cancel_that_finds_nothing_running(bundle):
    with Engine(bundle) as engine:
        engine.cancel()
        refused(engine.run, "cancelled", Status.CANCELLED)
        engine.run()


def test_progress_counts_what_is_queued(bundle):
    seen = []
    with Engine(bundle, max_particles=1, progress=seen.append) as engine:
        for item in range(3):
            engine.submit(make_job(NETS, item=item, particles=1, params=Params(steps=3)))
        engine.run()
    assert seen[0].jobs_queued == 2 and seen[0].particle_steps_left == 5 and seen[-1].jobs_done == 3


def test_jobs_that_fill_the_engine_to_the_last_place(bundle):
    seen = []
    with Engine(bundle, max_particles=5, progress=seen.append) as engine:
        for particles in (3, 2, 1):
            engine.submit(make_job(NETS, particles=particles, params=Params(steps=3)))
        engine.run()
    assert (seen[0].jobs_active, seen[0].jobs_queued) == (2, 1)


def test_jobs_that_are_dropped_while_they_wait(bundle):
    with Engine(bundle, max_particles=1) as engine:
        first, second, third, last = (engine.submit(make_job(NETS, item=i, params=Params(steps=4))) for i in range(4))
        second.release()
        last.release()
        assert engine.tick() == 2  # nor are they counted
        engine.run()
        assert first.result().particles.any() and third.result().particles.any()


def test_a_job_that_is_dropped_leaves_zeros(bundle):
    """At once, and for good: the caller may free its arrays."""
    with Engine(bundle) as engine:
        handle = engine.submit(make_job(NETS, params=Params(steps=9), trace=True))
        engine.tick()
        assert handle._trace.any()
        handle.release()
        for _ in range(2):
            assert not handle._trace.any() and not handle._particles.any()
            assert engine.tick() == 0


def test_a_graph_that_fails_while_it_runs_ends_its_jobs_alone(tmp_path):
    """An index that is out of range at one timestep; the engine takes the next job."""
    nets = make_nets()
    nets.weights["offset"] = nets.weights["offset"][:100]  # of 120 timesteps
    with Engine(write_bundle(tmp_path / "short", nets, 2)) as engine:
        ill = engine.submit(make_job(NETS, params=Params(steps=120)))
        refused(engine.run, "indices", Status.RUNTIME_ERROR)
        refused(ill.result, "indices", Status.RUNTIME_ERROR)
        (well,) = engine.reconstruct([make_job(NETS, params=Params(steps=2))])
        assert np.isfinite(well.particles).all()


def test_a_graph_that_fails_ends_all_jobs_of_its_batch(tmp_path):
    """None of them has done the step."""
    nets = make_nets()
    nets.weights["offset"] = nets.weights["offset"][:100]
    ill, well = (make_job(NETS, particles=1, params=Params(steps=steps)) for steps in (120, 2))
    with Engine(write_bundle(tmp_path / "short", nets, 2), threads=1) as engine:
        engine.reconstruct([well])
        first = engine.submit(ill)
        refused(engine.run, "indices", Status.RUNTIME_ERROR)
        again = engine.submit(ill)
        for _ in range(first.info().step):
            engine.tick()
        beside = engine.submit(well)
        refused(engine.tick, "indices", Status.RUNTIME_ERROR)
        for handle in (again, beside):
            assert handle.info().status == Status.RUNTIME_ERROR and not handle._particles.any()


def test_a_snapshot_without_the_trace_that_is_asked_for(bundle):
    job = make_job(NETS, params=Params(steps=5))
    with Engine(bundle) as engine:
        handle = engine.submit(job)
        engine.tick()
        snapshot = handle.snapshot()
        again = dataclasses.replace(job, snapshot=snapshot, trace=True)
        refused(lambda: engine.submit(again), "no trace")
        handle.release()


def kept(nets, size):
    """A decoder that keeps one more activation, of `size` values, or an output that is no tensor's type of ours."""
    g = GraphWriter(nets, 1, pack_weights(nets)[1])
    hidden = g.act(g("Add", g.times(g.reshaped("z", (M,)), "V1"), g.weight("b1")), out="hidden")
    g.reshaped(g.act(g("Add", g.times(hidden, "V2"), g.weight("b2")), out="pixels"), IMAGE, out="image")
    g("Slice", hidden, g.constant(np.array([0])), g.constant(np.array([size])), g.constant(np.array([1])), out="more")
    return g.model({"z": LATENT}, {"image": IMAGE, "hidden": (HIDDEN,), "pixels": (P,), "more": (size,)})


def test_graphs_that_are_not_what_the_engine_needs(tmp_path):
    decoder = kept(NETS, 0)
    bundle = write_bundle(tmp_path / "empty", NETS, 1, instead={"decoder": decoder})
    refused(lambda: Engine(bundle), "'more' must be float32 of fixed shape", Status.BAD_BUNDLE)
    graphs = make_graphs(NETS, 1, True)
    bundle = write_bundle(tmp_path / "phi", NETS, 1, instead={"features": graphs["features"].replace(b"phi", b"phj")})
    refused(lambda: Engine(bundle), "has no output 'phi'", Status.BAD_BUNDLE)


def test_graphs_for_other_batches_and_features_by_halves(tmp_path):
    bundle = write_bundle(tmp_path / "batches", NETS, 1)
    seal(bundle, [*lines_of(bundle), "graph decoder 3 decoder.b1.onnx"])
    refused(lambda: Engine(bundle), "batches of 'denoiser'", Status.BAD_BUNDLE)
    bundle = write_bundle(tmp_path / "half", NETS, 1)
    seal(bundle, [line for line in lines_of(bundle) if not line.startswith("feature_dim")])
    refused(lambda: Engine(bundle), "feature_dim", Status.BAD_BUNDLE)


def test_an_encoder_is_opened_when_it_is_asked_for(tmp_path):
    """By its contract: image -> z; a graph that is not one is refused then."""
    bundle = write_bundle(tmp_path / "bundle", NETS, 1)
    g = GraphWriter(NETS, 1, pack_weights(NETS)[1])
    g.reshaped("image", LATENT, out="z")
    (bundle / "encoder.b1.onnx").write_bytes(g.model({"image": IMAGE}, {"z": LATENT}))
    seal(bundle, [*lines_of(bundle), "graph encoder 1 encoder.b1.onnx"])
    x = np.arange(16, dtype=np.float32).reshape(1, *IMAGE)
    with Engine(bundle) as engine:
        np.testing.assert_array_equal(engine.evaluate("encoder", ["z"], image=x)["z"].ravel(), x.ravel())


def test_a_context_for_a_bundle_that_takes_none(tmp_path):
    g = GraphWriter(NETS, 1, pack_weights(NETS)[1])
    g("Identity", "z_t", out="eps")
    graph = g.model({"z_t": LATENT, "t": ()}, {"eps": LATENT})
    bundle = write_bundle(tmp_path / "bundle", NETS, 1, instead={"denoiser": graph})
    seal(bundle, [line for line in lines_of(bundle) if "context" not in line])
    job = make_job(NETS, params=Params(steps=3))
    with Engine(bundle) as engine:
        assert engine.reconstruct([job])[0].particles.any()
        job = dataclasses.replace(job, context=np.zeros(1, np.float32))
        refused(lambda: engine.submit(job), "bundle 'tiny' takes no context")


@pytest.mark.parametrize("type_name, kind", [("float64", 11), ("int32", 6), ("int64", 7), ("bool", 9), ("float16", 10)])
def test_an_output_of_another_type_is_named(tmp_path, type_name, kind):
    model = onnx.load_from_string(make_graphs(NETS, 1, True)["features"])
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(onnx.helper.make_node("Cast", ["before"], ["phi"], to=kind))
    model.graph.output[0].type.tensor_type.elem_type = kind
    bundle = write_bundle(tmp_path / "bundle", NETS, 1, instead={"features": model.SerializeToString()})
    refused(lambda: Engine(bundle), f"'phi' is {type_name} 1x5, float32 1x5 is needed", Status.BAD_BUNDLE)


@pytest.mark.parametrize("kind", [6, 7, 9, 10, 11])
def test_an_activation_of_another_type_is_named(tmp_path, kind):
    """Halves, too: they are for a GPU."""
    model = onnx.load_from_string(kept(NETS, 3))
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(onnx.helper.make_node("Cast", ["before"], ["more"], to=kind))
    model.graph.output[-1].type.tensor_type.elem_type = kind
    bundle = write_bundle(tmp_path / "bundle", NETS, 1, instead={"decoder": model.SerializeToString()})
    refused(lambda: Engine(bundle), "'more' must be float32 of fixed shape", Status.BAD_BUNDLE)


def test_an_output_that_is_no_tensor_is_named(tmp_path):
    model = onnx.load_from_string(make_graphs(NETS, 1, True)["decoder"])
    model.graph.node.append(onnx.helper.make_node("SequenceConstruct", ["image"], ["images"]))
    model.graph.output.append(onnx.helper.make_tensor_sequence_value_info("images", 1, None))
    bundle = write_bundle(tmp_path / "bundle", NETS, 1, instead={"decoder": model.SerializeToString()})
    refused(lambda: Engine(bundle), "graph value images is not a tensor", Status.BAD_BUNDLE)
