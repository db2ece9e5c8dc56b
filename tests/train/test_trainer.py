"""Training: it learns, it goes on bit for bit where it stopped, and a document means in a row what it means alone."""

from __future__ import annotations

import json
from functools import partial
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch

from tests.train.conftest import small
from truemask.train.checkpoint import checkpoints
from truemask.train.config import TrainConfig, TrainError
from truemask.train.model import batch_loss, bits_per_byte, build_model
from truemask.train.rows import Batch
from truemask.train.sample import continuation
from truemask.train.trainer import Trainer, schedule


def weights(trainer: Trainer) -> list[torch.Tensor]:
    states = [trainer.optimizer.state[parameter] for parameter in trainer.model.parameters()]
    optimizer = [state[name] for state in states for name in sorted(state)]
    return [*trainer.model.state_dict().values(), *optimizer]


def logged(run: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (run / "log.jsonl").read_text().splitlines()]


def test_resume_goes_on_bit_for_bit(config: TrainConfig, tmp_path: Path) -> None:
    straight = Trainer(config, tmp_path / "straight")
    list(straight.run())
    first = Trainer(config, tmp_path / "halved")
    list(first.run(stop=lambda: first.step == 3))
    torch.manual_seed(99)  # whatever happened to the generator in between
    second = Trainer.resume(tmp_path / "halved")
    assert second.step == 3
    list(second.run())
    pairs = list(zip(weights(straight), weights(second), strict=True))
    assert len(pairs) > 20
    assert all(torch.equal(a, b) for a, b in pairs)
    assert straight.held_out_bits() == second.held_out_bits()
    assert logged(tmp_path / "straight", "bits") == logged(tmp_path / "halved", "bits")


def test_resume_forgets_what_came_after_the_checkpoint(config: TrainConfig, tmp_path: Path) -> None:
    trainer = Trainer(config, tmp_path / "run")
    for step in trainer.run():
        if step.step == 5:  # as if the machine had stopped here: the last checkpoint is of step 3
            break
    again = Trainer.resume(tmp_path / "run")
    assert again.step == 3
    list(again.run())
    assert logged(tmp_path / "run", "step") == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_can_be_made_longer(config: TrainConfig, tmp_path: Path) -> None:
    list(Trainer(config, tmp_path / "run").run())
    longer = Trainer.resume(tmp_path / "run", steps=8)
    assert [step.step for step in longer.run()] == [7, 8]
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000008"


def test_another_text_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "text.txt"
    copy.write_text("".join(path.read_text() for path in sorted(folder.rglob("*.txt"))))
    list(Trainer(small(copy, steps=1), tmp_path / "run").run())
    copy.write_text(copy.read_text() + "more")
    with pytest.raises(TrainError, match="is no longer the text"):
        Trainer.resume(tmp_path / "run")


def test_it_learns_and_says_so(folder: Path) -> None:
    trainer = Trainer(small(folder, steps=60, dim=32, lr=1e-2, batch=5, evaluate_every=20))
    before = trainer.held_out_bits()
    steps = list(trainer.run())
    assert [step.step for step in steps if step.held_out is not None] == [20, 40, 60]
    assert steps[-1].share == 1
    assert steps[-1].tokens == 60 * 5 * 31
    assert steps[-1].held_out is not None
    assert steps[-1].held_out < trainer.baselines.unigram < before


def test_minutes_end_a_run_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("truemask.train.trainer.time.perf_counter", partial(next, count(step=0.125)))
    trainer = Trainer(small(folder, steps=None, minutes=0.01))
    steps = list(trainer.run())
    assert steps[-1].share == 1
    assert 0.6 <= steps[-1].seconds < 1.2  # a step looks at the clock a few times


def test_documents_in_a_row_cost_what_they_cost_alone(config: TrainConfig) -> None:
    """The packed row's loss is the sum of its documents' (law 2), and another document's bytes change nothing."""
    model, mask = build_model(config).double().eval(), config.expression()
    ids = torch.randint(256, (1, 31), generator=torch.Generator().manual_seed(3))
    labels = torch.randint(256, (1, 31), generator=torch.Generator().manual_seed(4))
    cuts = [0, 11, 24, 31]
    whole = batch_loss(model, Batch(ids, labels, [[11, 13, 7]]), mask, reduction="none")
    for start, stop in pairwise(cuts):
        part = Batch(ids[:, start:stop], labels[:, start:stop], [[stop - start]])
        alone = batch_loss(model, part, mask, reduction="none")
        torch.testing.assert_close(whole[start:stop], alone, rtol=1e-9, atol=1e-9)


def test_bits_per_byte_do_not_depend_on_the_batch(config: TrainConfig) -> None:
    trainer = Trainer(config)
    bits = [bits_per_byte(trainer.model, trainer.test_rows, trainer.mask, batch) for batch in (1, 2, 5)]
    assert bits == pytest.approx([bits[0]] * 3, rel=1e-6)
    assert trainer.model.training


def test_a_loss_that_is_not_finite_stops_the_run(config: TrainConfig) -> None:
    trainer = Trainer(config)
    with torch.no_grad():
        next(iter(trainer.model.parameters())).fill_(float("nan"))
    with pytest.raises(TrainError, match="the loss is nan at step 1; try a smaller --lr"):
        list(trainer.run())


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [schedule(step, 10, step / 100) for step in range(100)]
    peak = rates.index(max(rates))
    assert 8 <= peak <= 11
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert schedule(100, 10, 1.0) == pytest.approx(0.05)


def test_building_a_model_leaves_the_generator_alone(config: TrainConfig) -> None:
    torch.manual_seed(7)
    build_model(config)
    numbers = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(numbers, torch.rand(3))


def test_a_continuation_is_text_and_depends_on_its_seed_alone(config: TrainConfig) -> None:
    model, mask = build_model(config), config.expression()
    texts = ["".join(continuation(model, mask, "é", 40, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert 0 < len(texts[0]) <= 40
