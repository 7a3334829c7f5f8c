"""The registry of teacher kinds against the config sections that name them."""

from __future__ import annotations

import typing

import torch

from tutelage.config.teacher_config import ControlTeacher, TeacherConfig
from tutelage.data.store import open_store
from tutelage.teachers import TeacherContext, make_teacher
from tutelage.teachers.kinds import TEACHERS
from tutelage.types import Batch


def test_every_kind_of_config_is_registered():
    (union, _) = typing.get_args(TeacherConfig)
    kinds = {
        kind
        for config in typing.get_args(union)
        for kind in typing.get_args(config.model_fields["kind"].annotation)
    }
    assert set(TEACHERS) == kinds


def test_controls_give_every_position_their_distribution(text, tmp_path):
    store = open_store(text)
    context = TeacherContext(store, tmp_path, 32, torch.device("cpu"))
    batch = Batch(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64), (0, 32))
    tokens = torch.from_numpy(store.split("train").tokens[:].astype("int64"))
    counts_V = torch.bincount(tokens, minlength=store.vocab_size).double() + 1
    expected = {"unigram": counts_V / counts_V.sum(), "uniform": torch.full_like(counts_V, 1 / len(counts_V))}
    for kind, probs_V in expected.items():
        teacher = make_teacher(ControlTeacher(kind=kind), context)
        assert (teacher.retained, teacher.forward_flops, teacher.notes) == (None, 0.0, ())
        targets = teacher.targets(batch)
        found_NV = (targets.hidden_NE @ targets.head_VE.T).softmax(-1)
        assert found_NV.shape == (6, store.vocab_size)
        torch.testing.assert_close(found_NV.double(), probs_V.expand(6, -1), rtol=1e-5, atol=0)
