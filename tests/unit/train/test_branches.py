"""Budgets as branches of one warm-up-stable-decay run."""

from __future__ import annotations

import shutil

import pytest
from training import StopAt, assert_same_weights, losses

from tutelage.errors import Stopped, UserError
from tutelage.models.shapes import find_shape
from tutelage.progress import NullProgress
from tutelage.run import run
from tutelage.run_directory import run_id

OPTIM = {"schedule": "wsd", "warmup": "512", "decay": 0.25}


class Began(NullProgress):
    """Remembers the step from which a run went on."""

    def start(self, stage, total=None, unit="", done=0):
        if unit == "steps":
            self.step = done


def budget(make_config, steps, shorter=None, **changes):
    """A run of some steps that keeps the checkpoint before its decay and starts from that of `shorter`."""
    threads = {"device": "cpu", "threads": 1, "log_every": 1}
    base = {
        "name": f"steps-{steps}",
        "model": {"shape": "nano-20k"},
        "tokens": steps * 256,
        "optim": OPTIM,
        "checkpoint": {"every": 4 * 256, "keep_before_decay": True},
        "runtime": threads | ({} if shorter is None else {"branch_from": run_id(shorter)}),
    }
    return make_config(**base | changes)


def test_a_longer_run_from_a_shorter_ones_branch_point_is_bitwise_the_one_trained_alone(
    make_config, tmp_path
):
    short = budget(make_config, 8)
    middle = budget(make_config, 12, short)
    long = budget(make_config, 16, middle)
    run(short)
    for config, begins in ((middle, 6), (long, 9)):
        watcher = Began()
        branch = run(config, watcher)
        assert watcher.step == begins  # three quarters of the shorter run's steps
        steps = config.tokens // 256
        alone = run(budget(make_config, steps, output=str(tmp_path / "alone")))
        assert alone.id == branch.id  # where it starts does not change what it is
        assert_same_weights(branch, alone)
        assert losses(branch) == losses(alone)
        assert branch.state()["tokens"] == alone.state()["tokens"]


def test_what_follows_the_branch_point_may_differ_from_the_shorter_run(make_config, tmp_path):
    """Another decay was refused; weights exported in bfloat16 were a traceback."""
    changes = {"export_dtype": "bfloat16", "optim": OPTIM | {"decay": 0.5, "final_lr": 0.0}}
    run(short := budget(make_config, 8))
    watcher = Began()
    branch = run(budget(make_config, 16, short, **changes), watcher)
    assert watcher.step == 6
    alone = run(budget(make_config, 16, **changes, output=str(tmp_path / "alone")))
    assert alone.id == branch.id
    assert_same_weights(branch, alone)
    with pytest.raises(UserError, match=r"objective\.z_loss is null there and 0\.0001 here"):
        run(budget(make_config, 16, short, objective={"z_loss": 1e-4}))
    run(smooth := budget(make_config, 8, objective={"z_loss": 1e-4}))
    with pytest.raises(UserError, match=r"objective\.z_loss is 0\.0001 there and null here"):
        run(budget(make_config, 16, smooth))


def test_a_branch_goes_on_from_its_own_checkpoint_once_it_has_one(make_config, tmp_path):
    short = budget(make_config, 8)
    run(short)
    config = budget(make_config, 16, short)
    with pytest.raises(Stopped):
        run(config, StopAt(10))
    watcher = Began()
    resumed = run(config, watcher)
    assert watcher.step == 10
    assert losses(resumed) == losses(run(budget(make_config, 16, output=str(tmp_path / "alone"))))


def test_what_is_no_branch_point_is_refused(make_config):
    short = budget(make_config, 8)
    config = budget(make_config, 16, short)
    with pytest.raises(UserError, match=r"has no checkpoint from where its decay begins; train it with"):
        run(config)
    run(short)
    with pytest.raises(UserError, match="it is no beginning of this run: seed is 43 there and 44 here"):
        run(budget(make_config, 16, short, seed=44))
    with pytest.raises(UserError, match="decays later than this run does"):
        run(budget(make_config, 4, short))
    [shard] = (short.output / run_id(short)).glob("checkpoints/branch-point-*/*.safetensors")
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"cannot be started from \(shard-00001\.safetensors is damaged"):
        run(config)
    shard.write_bytes(content)
    assert run(config).is_done()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": OPTIM | {"schedule": "cosine"}}, r"need optim\.schedule = wsd, not cosine"),
        ({"optim": OPTIM | {"warmup": 0.1}}, r"warmup = 0\.1 depends on the budget; give it in tokens"),
        ({"teacher": {"kind": "unigram"}, "objective": {"alpha": 0.1}}, "starts at its beginning"),
        ({"optim": OPTIM | {"warmup": "lots"}}, "not a token budget"),
        ({"optim": OPTIM | {"warmup": "2x"}}, "counts tokens per parameter"),
        ({"optim": OPTIM | {"warmup": 1.5}}, r"optim\.warmup"),
    ],
)
def test_what_cannot_branch_is_refused(make_config, changes, message):
    with pytest.raises(UserError, match=message):
        budget(make_config, 16, budget(make_config, 8), **changes)


def test_a_branch_needs_the_weights_that_the_shorter_run_began_with_wherever_they_lie(make_config, tmp_path):
    """Where others had taken their place the result was that of no run; a copy of them was refused."""
    begun = run(budget(make_config, 4, name="begun"))
    first, moved = tmp_path / "model", tmp_path / "moved"
    shutil.copytree(begun.model, first)
    run(short := budget(make_config, 8, model={"path": str(first)}))
    long = budget(make_config, 16, short, model={"path": str(first)})
    first.rename(moved)
    watcher = Began()
    branch = run(
        budget(make_config, 16, model={"path": str(moved)}, runtime=long.runtime.model_dump()), watcher
    )
    assert watcher.step == 6
    alone = run(budget(make_config, 16, model={"path": str(moved)}, output=str(tmp_path / "alone")))
    assert alone.id == branch.id
    assert_same_weights(branch, alone)
    shutil.copytree(run(budget(make_config, 4, name="other", seed=44)).model, first)
    with pytest.raises(
        UserError, match="no beginning of this run: the model that it starts from has changed"
    ):
        run(long)


def test_a_branch_may_spell_out_the_learning_rate_of_its_shape(make_config):
    """The same run, by its id, was refused as no beginning."""
    run(short := budget(make_config, 8))
    watcher = Began()
    run(budget(make_config, 16, short, optim=OPTIM | {"lr": find_shape("nano-20k").lr}), watcher)
    assert watcher.step == 6
