"""Cut the power, and kill the process, at every moment at which a job waits for the disk; start it again.

    python cut_power.py FOLDER JOBS CUT_EVERY KILL_EVERY

JOBS is a file of JSON: a list of [kind, config], of which kind is "train", "teach" or "store". Each is done
once on a disk of which an image is kept at every so many-th flush, as a power cut would leave it there. From
each image the same job is started again, and must come to the same files. So it is after a SIGKILL at every
so many-th flush (0: at none). Prints a line of JSON for each job.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import forked_ranks
import torch
from small_disk import journaled_disk

from tutelage.config.data_config import StoreConfig
from tutelage.config.run_config import RunConfig
from tutelage.config.teacher_config import TeachConfig
from tutelage.data.build import build_store
from tutelage.progress import NullProgress
from tutelage.run import run
from tutelage.teachers.cache.cache_writer import write_cache
from tutelage.train.metrics import MEASURED

VOLATILE = {"seconds", "scoring_seconds", "tokens_per_second", "peak_flops", "warnings", "export", "seal"}
"""Fields of state.json that are measured; `export` is not measured again where the model is there."""


class Steps(NullProgress):
    """Remembers from which step a run went on, and to which it came."""

    first, reached = sys.maxsize, 0  # where nothing is trained again, nothing was lost

    def start(self, stage, total=None, unit="", done=0):
        if unit == "steps":
            Steps.first = done

    def advance(self, stage, done):
        Steps.reached = done


def do(kind, config, output):
    if kind == "train":
        run(RunConfig.model_validate_json(json.dumps(config | {"output": str(output)})), Steps())
        (output.parent / "first").write_text(str(Steps.first))
    elif kind == "teach":
        write_cache(TeachConfig.model_validate_json(json.dumps(config | {"output": str(output)})))
    else:
        build_store(StoreConfig.model_validate_json(json.dumps(config)), output)


def everything(output):
    """Every file below a directory, without what was measured; of checkpoints the names."""
    found = {}
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        if path.parent.name == "overlap" and path.name.startswith("."):
            continue  # runs share this directory, so nobody knows whose these are
        if path.name == "lock" or path.suffix == ".lock":
            continue  # nobody's: the cut came before its removal was flushed
        name, data = str(path.relative_to(output)), path.read_bytes()
        if path.name == "manifest.json" and path.with_name("train.bin").exists():
            data = None  # when it was built; the files that it lists are compared themselves
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in data.splitlines()]
            data = [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]
        elif path.name == "state.json":
            data = {key: value for key, value in json.loads(data).items() if key not in VOLATILE}
        elif "checkpoints" in path.parts or path.name in ("provenance.json", "checksums.json"):
            data = None
        found[name] = data
    return found


def at_flushes(act):
    """Call `act` with the number and the name of the file before each flush to the disk, one at a time."""
    real, turn, count = os.fsync, threading.RLock(), iter(range(10**6))

    def fsync(number):
        with turn:
            act(next(count), Path(f"/proc/self/fd/{number}").readlink().name)
            real(number)

    os.fsync = fsync


def keep_images(image, folder, every, work):
    """Do the work, and keep a copy of the disk at every so many-th flush and at the end."""

    def act(number, name):
        if number % every:
            return
        shutil.copyfile(image, folder / f"{number:04d}.img")
        (folder / f"{number:04d}.json").write_text(json.dumps([name, Steps.reached]))

    at_flushes(act)
    work()
    (folder / "end.json").write_text(json.dumps(["end", Steps.reached]))
    shutil.copyfile(image, folder / "end.img")


def die_at(fatal, work):
    at_flushes(lambda number, _: number == fatal and os.kill(os.getpid(), signal.SIGKILL))
    work()


def cut(folder, kind, config, every):
    """Cut the power at each flush of a job; return how many cuts there were, and the steps they cost."""
    place, images = folder / "disk", folder / "images"
    images.mkdir(parents=True)
    work, costs = partial(do, kind, config, place / "out"), [0]
    with journaled_disk(folder / "disk.img", place):
        forked_ranks.run(1, partial(keep_images, folder / "disk.img", images, every, work))
        whole = everything(place / "out")
    for image in sorted(images.glob("*.img")):
        moment, reached = json.loads(image.with_suffix(".json").read_text())
        with journaled_disk(image, place):
            forked_ranks.run(1, work)
            again = everything(place / "out")
            assert again.keys() == whole.keys(), (image, moment, again.keys() ^ whole.keys())
            different = [name for name, data in whole.items() if again[name] != data]
            assert not different, (image, moment, different)
            if kind == "train":
                costs.append(reached - int((place / "first").read_text()))
        image.unlink()
    return whole, {"cuts": len([*images.glob("*.json")]), "most_steps_lost": max(costs)}


def kill(folder, kind, config, flushes, every, whole):
    """Kill a job at every so many-th flush; return how often."""
    place, kills = folder / "disk", 0  # of the same name, which the card of a model repeats
    work = partial(do, kind, config, place / "out")
    for fatal in range(0, flushes, every):
        shutil.rmtree(place)
        place.mkdir()
        [code] = forked_ranks.wait(forked_ranks.start(1, partial(die_at, fatal, work)))
        kills += code == -signal.SIGKILL
        forked_ranks.run(1, work)
        again = everything(place / "out")
        assert again == whole, (fatal, [name for name in whole if again.get(name) != whole[name]])
    return kills


def main(folder, jobs, cut_every, kill_every):
    for number, (kind, config) in enumerate(json.loads(Path(jobs).read_text())):
        place = Path(folder) / f"{kind}-{number}"
        whole, found = cut(place, kind, config, cut_every)
        if kill_every:
            flushes = found["cuts"] * cut_every
            found["kills"] = kill(place, kind, config, flushes, kill_every, whole)
        print(json.dumps(found | {"job": kind}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
