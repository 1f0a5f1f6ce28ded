"""One line per public callback: how to build it, and what it promises. A new callback is a line in `CASES`."""

from collections.abc import Callable
from dataclasses import dataclass, field

from lightning.pytorch import Callback

from forge_lightning import callbacks
from tests.compression.baseline import baseline, with_example_losses
from tests.contract.modules import with_choices
from tests.dream import build


@dataclass(frozen=True)
class Case:
    build: Callable[[], Callback]
    id: str
    inert: Callable[[], Callback] | None = None  # settings under which it must change nothing
    observer: bool = False  # the callback says `Changes: nothing.`
    twin: Callable[[], Callback] | None = None  # a second instance, with another name
    exempt: dict[str, str] = field(default_factory=dict)  # row -> why it does not apply
    logs: frozenset[str] = frozenset()  # every key that its docstring lists
    constant_logs: frozenset[str] = frozenset()  # of those, the ones that a healthy run holds constant
    of_rank: frozenset[str] = frozenset()  # of those, the ones that its docstring calls rank 0's
    placeholders: dict[str, str] = field(default_factory=dict)  # pattern in a key -> what its docstring says for it
    adapt: Callable[[type], type] = lambda module: module  # gives a module what the callback cannot do without
    lags: bool = False  # on an accelerator it takes in a step's outcome at the end of the next one

    def __str__(self) -> str:
        return self.id


GROKFAST_LOGS = frozenset(
    f"forge/grokfast/{key}" for key in ("lamb", "cosine", "grad_norm_before", "grad_norm_after", "skipped_steps")
)


def grokfast(id: str, exempt=(), **kwargs) -> Case:
    return Case(
        exempt=dict(exempt),
        build=lambda: callbacks.Grokfast(**kwargs),
        id=id,
        inert=lambda: callbacks.Grokfast(**kwargs | {"lamb": 0.0}),
        twin=lambda: callbacks.Grokfast(**kwargs, name="second"),
        logs=GROKFAST_LOGS,
        constant_logs=frozenset({"forge/grokfast/skipped_steps"})
        | (frozenset({"forge/grokfast/lamb"}) if kwargs.get("schedule") == "constant" else frozenset()),
    )


ESTIMATORS = ("two_nn", "participation_ratio")
GEOMETRY_LOGS = frozenset(
    f"forge/geometry/net.{layer}/{key}"
    for layer in range(4)
    for key in (*ESTIMATORS, *(f"{name}_se" for name in ESTIMATORS), "num_points")
) | {"forge/geometry/overhead"}


def geometry_probe(**kwargs):
    """Cheap estimators, no limit on time: the models here take a millisecond a step."""
    return callbacks.GeometryProbe(every_n_steps=2, num_points=8, estimators=ESTIMATORS, max_overhead=None, **kwargs)


TIMES = ("step", "data", "forward_backward", "optimizer", "callbacks", "other")
TELEMETRY_LOGS = frozenset(
    f"forge/telemetry/{key}"
    for key in (
        *("loss", "grad_norm_before", "grad_norm_after", "lr", "examples_per_second", "peak_memory"),
        *(f"{part}_seconds" for part in TIMES),
    )
)


EDGE_LOGS = frozenset(
    f"forge/edge/{key}"
    for key in (
        *("success_rate", "expected_success", "in_band", "difficulty", "difficulty_p10", "difficulty_p90"),
        *("skill", "skill_se", "target_low", "target_high"),
    )
)


def edge_controller(policy, low, more=()) -> Case:
    """A bare loss is all that most of the modules return."""
    options = {"policy": policy, "loss_threshold": 0.66, "target_range": (low, 0.9)}
    return Case(
        build=lambda: callbacks.EdgeController(**options),
        id=f"edge-controller-{policy}",
        inert=lambda: callbacks.EdgeController(**options, steer=False),
        twin=lambda: callbacks.EdgeController(**options, steer=False, name="second"),
        logs=EDGE_LOGS | {f"forge/edge/{key}" for key in more},
        constant_logs=frozenset({"forge/edge/target_low", "forge/edge/target_high"}),
        exempt={
            "accumulation": "what is drawn depends on the batch size",
            "shards_the_batch": "the sampler shares batches out itself (test_difficulty: two processes equal one)",
        },
        adapt=with_choices,
        lags=True,
    )


def self_model(id: str, targets, exempt=(), lags=False, **kwargs) -> Case:
    options = {"warmup_steps": 3, "watch_every_n_steps": 2, **kwargs}
    logs = {f"forge/self_model/net.{n}/{key}" for n in targets for key in HEAD_LOGS}
    return Case(
        build=lambda: callbacks.SelfModel(**options),
        id=id,
        inert=lambda: callbacks.SelfModel(**options | {"weight": 0.0}),
        twin=lambda: callbacks.SelfModel(**options, name="second"),
        logs=frozenset(logs | {"forge/self_model/loss", "forge/self_model/weight"}),
        placeholders={r"net\.\d": "<layer>"},
        exempt=dict(exempt)
        | {
            "foreign_modules: PartlyFrozen": "all that could learn to be predictable is frozen there, and it says so",
            "checkpoints_cross": "the head's weights are in the optimizer, whose state must fit",
        },
        lags=lags,
    )


def temperature_curriculum(weight=0.5, **kwargs):
    options = {"bins": [(2, 4), (0.5, 2)], "teacher_decay": 0.9, "warmup_steps": 3, "max_steps_per_bin": 9}
    return callbacks.TemperatureCurriculum(weight=weight, **options | kwargs)


def agreement(id, exempt=None, **kwargs) -> Case:
    return Case(
        build=lambda: temperature_curriculum(**kwargs),
        id=id,
        inert=lambda: temperature_curriculum(weight=0.0, **kwargs),
        twin=lambda: temperature_curriculum(weight=0.3, name="second", **kwargs),
        logs=TEMPERATURE_LOGS,
        constant_logs=frozenset({"forge/temperature/accuracy"}),
        placeholders={r"2-4|0.5-2": "<low>-<high>"},
        exempt=exempt or {},
    )


DREAM_LOGS = ("stored", "frontier", "share", "replay_loss", "replay_success", "probe_loss", "forgetting")
SLEEP_LOGS = ("cycles", "loss_before", "loss_after", "success_before", "success_after")


def dream_replay(mode, logs, exempt, **kwargs) -> Case:
    options = {"mode": mode, "every_n_steps": 2, "num_steps": 2, "probe_size": 8, "batch_size": 8, **kwargs}
    off = {"fraction": 0.0} if mode == "mix" else {"num_steps": 0}
    return Case(
        build=lambda: build.dream_replay(**options),
        id=f"dream-replay-{mode}",
        inert=lambda: build.dream_replay(**options | off),
        twin=lambda: build.dream_replay(**options | {"mode": "cycle"}, name="second"),  # one of them can mix
        logs=frozenset(f"forge/dream/{key}" for key in logs),
        constant_logs=frozenset({"forge/dream/forgetting"}),  # 0 as long as the probe gets better
        of_rank=frozenset(f"forge/dream/{key}" for key in DREAM_LOGS[:5]),
        exempt=exempt,
        lags=True,
    )


TEMPERATURE_LOGS = frozenset(
    f"forge/temperature/{key}"
    for key in (
        *("temperature", "kl", "weight", "round", "bin", "accuracy"),
        *(f"{edges}/{name}" for edges in ("2-4", "0.5-2") for name in ("nll", "ece", "entropy", "p_correct")),
    )
)
CALIBRATION_LOGS = frozenset(
    f"forge/calibration/{key}"
    for key in ("nll", "ece", "brier", "accuracy", "entropy", "nll_fitted", "ece_fitted", "temperature")
)
HEAD_LOGS = ("explained_variance", "copy_explained_variance", "effective_rank")

CASES = [
    self_model(
        "self-model-paper",
        targets=(0, 1),
        lags=True,
        layers=["net.0", "net.1"],
        adaptive=True,
    ),
    self_model("self-model-forward", targets=(2,), layers=["net.0", "net.2"], form="forward", weight=3.0),
    dream_replay(
        "mix",
        logs=DREAM_LOGS,
        exempt={
            "accumulation": "what is drawn depends on the batch size",
            "shards_the_batch": "each process draws from what it has seen",
            "random_stream_untouched": "dropout of larger batches draws more",
        },
        fraction=0.25,
        distillation=0.5,
        strategy="priority",
    ),
    dream_replay(
        "cycle",
        logs=DREAM_LOGS + SLEEP_LOGS,
        exempt={"shards_the_batch": "each process draws from what it has seen"},
    ),
    edge_controller("skill", low=0.5),
    edge_controller("item", low=0.6, more=["mastered"]),
    edge_controller("bandit", low=0.6),
    agreement("temperature-curriculum"),
    agreement(
        "temperature-curriculum-fraction",
        exempt=dict.fromkeys(("accumulation", "shards_the_batch"), "which rows are compared depends on the batch size"),
        fraction=0.4,
    ),
    Case(
        build=lambda: callbacks.TernaryQAT(ramp_steps=3),
        id="ternary-qat",
        inert=lambda: callbacks.TernaryQAT(lamb=0.0),
        twin=lambda: callbacks.TernaryQAT(lamb=0.0, name="second"),
        logs=frozenset(f"forge/ternary/{key}" for key in ("lamb", "weight_error", "zero_share")),
    ),
    Case(
        build=lambda: callbacks.RegressionGate(baseline()),
        id="regression-gate",
        observer=True,
        twin=lambda: callbacks.RegressionGate(baseline(), name="second"),
        adapt=with_example_losses,
        logs=frozenset(f"forge/regression/{key}" for key in ("loss_difference", "loss_upper", "step_ratio")),
    ),
    Case(
        build=callbacks.Calibration,
        id="calibration",
        observer=True,
        twin=lambda: callbacks.Calibration(name="second"),
        logs=CALIBRATION_LOGS,
        constant_logs=frozenset({"forge/calibration/accuracy"}),  # of eight examples
    ),
    grokfast("grokfast-ema", alpha=0.9, lamb=2.0, schedule="constant"),
    grokfast("grokfast-ma", filter="ma", window_size=3, lamb=2.0, schedule="constant"),
    grokfast(
        "grokfast-projection",
        exempt={"foreign_modules: LowRank": "gradient and slow gradient never agree in its 8 steps, and λ stays 0"},
        filter="projection",
        alpha=0.9,
        lamb=0.25,
        schedule="cosine_similarity",
    ),
    Case(
        build=callbacks.RNGState,
        id="rng-state",
        observer=True,
        twin=lambda: callbacks.RNGState(name="second"),
    ),
    Case(
        build=callbacks.RunSummary,
        id="run-summary",
        observer=True,
        twin=lambda: callbacks.RunSummary(name="second"),
    ),
    Case(
        build=callbacks.InterruptCheckpoint,
        id="interrupt-checkpoint",
        observer=True,
        twin=lambda: callbacks.InterruptCheckpoint(name="second"),
    ),
    Case(
        build=lambda: callbacks.CodeEvaluation(num_samples=2, temperature=1.0, limit_problems=1),
        id="code-evaluation",
        observer=True,
        twin=lambda: callbacks.CodeEvaluation(name="second", max_new_tokens=4),
        logs=frozenset(f"forge/code_evaluation/{key}" for key in ("pass_at_1", "timeout_rate", "num_problems")),
        constant_logs=frozenset({"forge/code_evaluation/timeout_rate", "forge/code_evaluation/num_problems"}),
        exempt={"fsdp2": "refuses sharded weights (test_code_evaluation)"},
    ),
    Case(
        build=geometry_probe,
        id="geometry-probe",
        observer=True,
        twin=lambda: geometry_probe(name="second"),
        logs=GEOMETRY_LOGS,
        constant_logs=frozenset(key for key in GEOMETRY_LOGS if key.endswith("num_points")),
        placeholders={r"net\.\d": "<layer>", "two_nn|participation_ratio": "<estimator>"},
    ),
    Case(
        build=callbacks.Telemetry,
        id="telemetry",
        observer=True,
        twin=lambda: callbacks.Telemetry(name="second"),
        logs=TELEMETRY_LOGS,
        constant_logs=frozenset({"forge/telemetry/lr", "forge/telemetry/peak_memory"}),
    ),
    Case(
        build=lambda: callbacks.StageClassifier(cross_entropy=True),
        id="stage-classifier",
        observer=True,
        twin=lambda: callbacks.StageClassifier(cross_entropy=True, name="second"),
        logs=frozenset({"forge/stage/number", "forge/stage/gap"}),
        constant_logs=frozenset({"forge/stage/number"}),  # in three epochs; see test_stage_classifier
    ),
]
