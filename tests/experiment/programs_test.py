"""Kept traces: found again when nothing has changed, and never when something has."""

import jax
import numpy as np
import pytest
from jax import export

from bn_jax import activations, ops, train
from bn_jax.distributed import mesh
from bn_jax.experiment import build, programs
from bn_jax.experiment.evaluator import Evaluator
from configs import mnist_bn


def small(**changes):
    config = mnist_bn.get_config("synthetic").unlock()
    config.update_from_flattened_dict(
        {"batch_size": 40, "bn.group_size": 20, "steps_per_dispatch": 1, **changes}
    )
    return config


def texts(config):
    """The text of every program of the trainer, by name, as `programs.compiled` traces it."""
    exp, found = build.build(config), {}

    def note(about, make):
        made = make()
        if about[0] != "activations":  # that one is JSON
            module = export.deserialize(bytearray(made)).mlir_module()
            # Where in the source it was traced from is in the text, too.
            found[about[0]] = [line for line in module.splitlines() if line[:4] != "#loc"]
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "kept", note)
        state = build.abstract_state(exp)
        fed = next(train.feed(exp, 0, 1))
        train.compile_step(exp, 1, state, *fed, exp.hyper, np.uint32(config.seed))
        Evaluator(exp).compile()
        activations.RecordedActivations(exp).compile()
    return found


@pytest.fixture
def cache(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / programs.KEPT
    jax.config.update("jax_compilation_cache_dir", before)


def double(cfg, x, times=2.0):
    return programs.compiled("double", lambda x: times * x, (x,), cfg, made_from=times)


def test_a_second_start_traces_nothing(cache, monkeypatch):
    x = np.arange(3.0, dtype=np.float32)
    first = double({"a": 1}, x)(x)
    monkeypatch.setattr(export, "export", lambda *_: pytest.fail("traced again"))
    np.testing.assert_array_equal(double({"a": 1}, x)(x), first)
    np.testing.assert_array_equal(double({"a": 1, "learning_rate": 3.0}, x)(x), first)
    np.testing.assert_array_equal(first, [0, 2, 4])


@pytest.mark.parametrize(
    "change", ["config", "made_from", "shape", "dtype", "plain", "source", "setting"]
)
def test_what_a_trace_depends_on_makes_another(cache, monkeypatch, change):
    x = np.arange(4.0, dtype=np.float32)
    double({"a": 1}, x)
    assert len(list(cache.iterdir())) == 1
    if change == "source":
        monkeypatch.setattr(programs, "_source", lambda: "changed")
    if change == "plain":
        with ops.plain():
            double({"a": 1}, x)
    elif change == "setting":
        with jax.default_matmul_precision("float32"):
            double({"a": 1}, x)
    else:
        again = {"shape": x[:3], "dtype": x.astype(np.int32)}.get(change, x)
        times = 3.0 if change == "made_from" else 2.0
        y = double({"a": 2 if change == "config" else 1}, again, times)(again)
        np.testing.assert_array_equal(y, times * again)
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_file_is_made_anew(cache):
    x = np.ones(2, np.float32)
    double({}, x)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for damage in (b"", whole[:-1], whole[:100] + b"?" + whole[101:]):
        file.write_bytes(damage)
        np.testing.assert_array_equal(double({}, x)(x), [2, 2])
        assert programs.kept(["x"], lambda: b"y") == b"y"
        content = file.read_bytes()
        assert content[32:] and content != damage


def test_a_folder_that_cannot_be_written_costs_time_only(cache):
    cache.write_text("no folder")
    x = np.ones(2, np.float32)
    np.testing.assert_array_equal(double({}, x)(x), [2, 2])


def test_what_jax_cannot_export_is_compiled_all_the_same(cache, monkeypatch):
    def refuse(_):
        raise ValueError("Cannot serialize code with custom calls")

    monkeypatch.setattr(export, "export", refuse)
    x = np.ones(2, np.float32)
    np.testing.assert_array_equal(double({}, x)(x), [2, 2])
    assert not cache.exists()
    with pytest.raises(ValueError, match="mine"):
        programs.compiled("bad", mistaken, (x,), {})


def mistaken(x):
    raise ValueError("mine")


def test_the_oldest_go_first(cache, monkeypatch):
    monkeypatch.setattr(programs, "KEEP", 3)
    for i in range(6):
        assert programs.kept([i], lambda i=i: b"%d" % i) == b"%d" % i
    assert len(list(cache.iterdir())) == 3


OTHER = {  # a value of each field that no program is said to be made from
    "learning_rate": 0.5, "momentum": 0.5, "l2": 0.5, "decay_rate": 0.5, "decay_epochs": 5.0,
    "total_steps": 77_000, "seed": 5, "name": "other", "statistics_batches": 6, "keep_last": 9,
    "keep_best": 4, "log_every": 7, "eval_every": 500, "checkpoint_every": 1000, "scale": "other",
    "data.shuffle": "global", "record.tensorboard": False,
}  # fmt: skip


def test_fields_that_are_not_traced_leave_every_program_as_it_is():
    first = texts(small(l2=0.1))  # none is a program of its own, and another kind of argument
    assert set(first) == {"train", "evaluate", "population", "percentiles"}
    assert {name.partition(".")[0] for name in OTHER} <= set(programs.NOT_TRACED)
    assert texts(small(**OTHER)) == first
    changed = texts(small(**{"bn.epsilon": 0.1}))
    assert all(changed[name] != first[name] for name in first)


def test_a_kept_program_gives_the_bits_of_a_fresh_one(cache):
    exp = build.build(small())
    state = jax.device_get(jax.jit(lambda: build.initial_state(exp))())
    batch = jax.device_get(next(train.feed(exp, 0, 1)))

    def after():
        mine = mesh.put_replicated(exp.mesh, state)
        fed = mesh.put_batch(exp.mesh, batch[0], 40)
        arguments = (mine, fed, exp.hyper, np.uint32(0))
        program = train.compile_step(exp, 1, *arguments)
        return jax.tree.leaves(jax.device_get(program(*arguments)))

    fresh = after()
    assert len(list(cache.iterdir())) == 1
    jax.clear_caches()
    for a, b in zip(fresh, after(), strict=True):
        np.testing.assert_array_equal(a, b)
