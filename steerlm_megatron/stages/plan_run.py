"""``steerlm plan run …``: what the steps of a run cost, and what DPO and PPO would cost in their place.

Owns: which steps are counted, with which configuration, and the sizes of what they work on. Does not own: counts and
times (``plan/``). Invariant: a step has the configuration that ``run`` gives it, so that ``pipeline.*`` counts.
"""

from __future__ import annotations

from dataclasses import replace

from steerlm_megatron.config.schema import Config
from steerlm_megatron.observe.runfolder import RunFolder
from steerlm_megatron.plan import methods
from steerlm_megatron.plan.hardware import Hardware
from steerlm_megatron.plan.inference import drawing_time, scoring_seconds
from steerlm_megatron.plan.methods import Method, Net, Texts
from steerlm_megatron.plan.report import Plan, StepCost
from steerlm_megatron.plan.timing import step_time
from steerlm_megatron.plan.workload import Workload
from steerlm_megatron.runtime.parallel import Layout
from steerlm_megatron.stages.pipeline_run import Run, Step
from steerlm_megatron.stages.pipeline_steps import steps_of
from steerlm_megatron.stages.session import Session

_NO_COUNT = (
    "what the steps cost is not counted, since nothing says how many conversations there are: set plan.samples, or "
    "data.train to shards"
)
_NOTES = (
    "the steps: evaluate is not counted, and of what bootstrapping draws, everything is taken to be kept; scoring and "
    "drawing are lower bounds (docs/cost.md)",
    "DPO and PPO: by plan.pairs, plan.dpo_epochs, plan.rollouts, plan.ppo_epochs; a critic and a reward model as large "
    "as the predictor",
)


def add_costs(made: Plan, config: Config, work: Workload, gpu: Hardware, ranks: int, vocab_size: int) -> None:
    """Add to a plan what the steps of ``run`` cost and how DPO and PPO compare; a note if that is not known."""
    if work.rows is None:
        made.notes.append(_NO_COUNT)
        return
    at = Layout(rank=0, world_size=ranks, tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, dp_rank=0, dp_size=ranks)
    folder = RunFolder(config.run_dir or "runs/run/plan", config.command, rank=1)  # only rank 0 writes
    run = Run(config, Session(config, at, folder), steps_of(config))
    costs = _Costs(work, gpu, ranks, vocab_size)
    for step in run.steps.values():
        if step.kind == "base" and config.init_from is not None:
            continue
        made.steps_of_run += costs.of(step, step.config(run))
    if not config.ablation.rows:
        made.methods = compared(config, costs, {name: step.config(run) for name, step in run.steps.items()})
    made.notes += _NOTES


class _Costs:
    """The costs of steps that work on an epoch of ``work``."""

    def __init__(self, work: Workload, gpu: Hardware, ranks: int, vocab_size: int) -> None:
        self.work, self.gpu, self.ranks, self.vocab_size = work, gpu, ranks, vocab_size
        assert work.rows is not None
        self.samples = work.rows * work.samples
        length, share = work.tokens / work.samples, min(1.0, work.targets / work.tokens)
        self.corpus = Texts(self.samples, length * (1 - share), length * share, work.squares / work.samples)

    def sampled(self, config: Config, kind: str = "bootstrap") -> Texts:
        """Return the responses of a round of bootstrapping, or of an iteration of SteerLM 2.0 (by the step's ``kind``):
        as long as the corpus's, up to ``sampling.max_tokens``.
        """
        each = config.bootstrap.responses_per_prompt
        if kind.startswith("steerlm2"):
            each = config.steerlm2.responses
        prompts = min(config.bootstrap.prompts or self.samples, self.samples)
        response = max(1.0, min(self.corpus.response, config.sampling.max_tokens))
        return Texts(prompts * each, self.corpus.prompt, response)

    def of(self, step: Step, config: Config) -> list[StepCost]:
        """Return the rows of a step; none for one that runs no model, or has no count."""
        net = net_of(step.name, config, self.vocab_size)
        if step.command in ("train_ap", "train_sft"):
            rows = float(self.work.rows or 0)
            if step.kind in ("bootstrapped", "steerlm2"):
                mix = config.bootstrap.mix if step.kind == "bootstrapped" else 0.0
                rows = self.sampled(config, step.kind).tokens / self.work.tokens / (1 - mix)
            return [self._training(step.name, config, rows, net.head)]
        if step.command == "annotate":
            return [self._scoring(step.name, config, self.corpus)]
        if step.command == "bootstrap":
            texts = self.sampled(config, step.kind)
            return [
                self._drawing(f"{step.name}: draw", config, texts),
                self._scoring(f"{step.name}: score", config, texts),
            ]
        if step.command == "weigh":  # by the model that drew the responses, and by the one without attributes
            texts = self.sampled(config, step.kind)
            return [self._scoring(f"{step.name}: {of}", config, texts, head=False) for of in ("policy", "base")]
        return []

    def _training(self, name: str, config: Config, rows: float, head: bool) -> StepCost:
        per_step = self.work.rows_per_step(config.train.global_batch_samples)
        steps = config.train.steps or max(1.0, config.train.epochs * rows / per_step)
        time = step_time(
            config.model, config.parallel, config.engine, self.work, self.gpu, self.ranks, self.vocab_size, per_step,
            config.train.micro_batch_rows, head,
        )  # fmt: skip
        return StepCost(name, "train", steps * time.tokens, steps * time.flops, steps * time.seconds)

    def _scoring(self, name: str, config: Config, texts: Texts, head: bool | None = None) -> StepCost:
        head = config.ap.kind == "regression" if head is None else head
        one = methods.scored(name, net_of(name, config, self.vocab_size, head), texts, "")
        rows = texts.tokens / self.work.tokens
        seconds = scoring_seconds(
            config.model, config.parallel, config.engine, self.work, self.gpu, self.ranks, self.vocab_size, rows, head
        )
        return StepCost(name, "score", one.tokens, one.flops, seconds)

    def _drawing(self, name: str, config: Config, texts: Texts) -> StepCost:
        one, limits = methods.drawn(name, net_of(name, config, self.vocab_size), texts, ""), config.generation
        time = drawing_time(
            config.model, config.parallel, config.engine, self.gpu, self.ranks, self.vocab_size, texts.count,
            texts.prompt, texts.response, limits.max_batch, limits.memory_fraction,
        )  # fmt: skip
        return StepCost(name, f"draw, {time.batch} at a time", one.tokens, one.flops, time.seconds)


def net_of(name: str, config: Config, vocab_size: int, head: bool | None = None) -> Net:
    """Return the model of a step's configuration; ``head``: whether it has values in the place of the output layer,
    None as its command says.
    """
    wanted = config.command == "train_ap" and config.ap.kind == "regression" if head is None else head
    return Net(name, config.model, vocab_size, wanted)


def compared(config: Config, costs: _Costs, steps: dict[str, Config]) -> list[Method]:
    """Return SteerLM, DPO and PPO on this corpus and these models."""
    plan, corpus, vocab = config.plan, costs.corpus, costs.vocab_size
    ap, acsft, bootstrap = steps["train_ap"], steps["acsft"], steps["bootstrap"]
    policy = Net("policy", acsft.model, vocab)
    predictor = net_of("predictor", ap, vocab)
    one_value = replace(predictor, head=True)
    pairs = Texts(plan.pairs or corpus.count, corpus.prompt, corpus.response, corpus.square)
    rollouts = Texts(plan.rollouts or corpus.count, corpus.prompt, costs.sampled(bootstrap).response)
    return [
        methods.steerlm(
            policy, predictor, corpus, corpus, costs.sampled(bootstrap), predictor_epochs=_epochs(ap, costs),
            epochs=_epochs(acsft, costs), mix=bootstrap.bootstrap.mix, rounds=config.bootstrap.rounds,
        ),
        methods.dpo(policy, corpus, pairs, sft_epochs=_epochs(acsft, costs), epochs=plan.dpo_epochs),
        methods.ppo(
            policy, replace(one_value, name="critic"), replace(one_value, name="reward"), corpus, pairs, rollouts,
            sft_epochs=_epochs(acsft, costs), epochs=plan.ppo_epochs,
        ),
    ]  # fmt: skip


def _epochs(config: Config, costs: _Costs) -> float:
    """Return how often a training step sees the corpus."""
    if config.train.steps is None:
        return config.train.epochs
    per_step = costs.work.rows_per_step(config.train.global_batch_samples)
    return config.train.steps * per_step / (costs.work.rows or 1)
