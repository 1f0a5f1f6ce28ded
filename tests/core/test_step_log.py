"""Numbers that belong to one optimizer step."""

import csv
import math

from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from forge_lightning.core.callback import ForgeCallback
from forge_lightning.core.step_log import (
    is_logging_step,
    last_logged,
    log_also_every,
    log_at_this_step,
    logged_at_this_step,
    muted,
    publish,
    published,
)
from tests.contract.modules import Plain
from tests.contract.rows import fit


class Logs(Callback):
    """Logs the number of the step at the steps of `when`."""

    def __init__(self, *when, also=None, silent=False):
        self.when, self.also, self.silent = when, also, silent
        self.due, self.seen, self.step = [], [], 0

    def on_train_start(self, trainer, pl_module):
        log_also_every(trainer, self.also)

    def on_before_optimizer_step(self, trainer, *_):
        self.due.append(is_logging_step(trainer))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.step += 1
        if self.step in self.when:
            if self.silent:
                with muted(trainer, pl_module):
                    log_at_this_step(trainer, {"forge/x/n": float(self.step)})
            else:
                log_at_this_step(trainer, {"forge/x/n": float(self.step)})
        self.seen.append(logged_at_this_step(trainer).get("forge/x/n"))

    def on_train_end(self, trainer, pl_module):
        self.last = last_logged(trainer, "forge/x/n", "forge/y/n")
        self.missing = last_logged(trainer, "forge/y/n")
        log_also_every(trainer, None)


def run(callback, tmp_path, **options):
    _, trainer = fit([callback], Plain, logger=CSVLogger(tmp_path, name="", version=""), **options)
    with open(tmp_path / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("forge/x/n")]
    return trainer, [(int(row["step"]), float(row["forge/x/n"])) for row in rows]


def test_a_number_is_logged_at_its_step_alone(tmp_path):
    callback = Logs(2, 5)
    trainer, rows = run(callback, tmp_path, log_every_n_steps=1)
    assert rows == [(1, 2.0), (4, 5.0)], "loggers count steps from 0"
    assert callback.seen == [None, 2.0, None, None, 5.0, None, None, None]
    assert callback.last == 5.0
    assert math.isnan(callback.missing)
    assert float(trainer.callback_metrics["forge/x/n"]) == 5.0


def test_logging_steps_are_the_trainers_and_those_asked_for(tmp_path):
    callback = Logs(1, also=3)
    run(callback, tmp_path, log_every_n_steps=4)
    assert [step for step, due in enumerate(callback.due, 1) if due] == [3, 4, 6, 8]


def test_nothing_is_logged_while_muted(tmp_path):
    callback = Logs(2, 3, silent=True)
    trainer, rows = run(callback, tmp_path, log_every_n_steps=1)
    assert rows == []
    assert "forge/x/n" not in trainer.callback_metrics


class Publishes(ForgeCallback):
    """Logs a number of its own rank, and publishes one that all have, in its first fit alone."""

    namespace = "mine"

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.seen.append(published(trainer, "forge/mine/shared"))

    def on_step_end(self, trainer, pl_module, outputs, batch):
        self.log_metrics(trainer, {"own": 1.0})
        publish(trainer, {"forge/mine/shared": 2.0})


def test_only_what_is_the_same_on_all_ranks_is_published_and_for_one_fit():
    callback = Publishes()
    model, trainer = fit([callback], Plain)
    assert published(trainer, "forge/mine/shared") == 2.0
    assert math.isnan(published(trainer, "forge/mine/own"))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    assert all(math.isnan(value) for value in callback.seen)
    assert len(callback.seen) == 2
