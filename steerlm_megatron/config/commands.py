"""The commands, what each does, and which keys of the configuration it reads.

Owns: :data:`COMMANDS`, and the answers that follow from it: which keys belong to a command, which commands read another
key, which keys must be set. Does not own: the keys themselves (``schema.py``), running commands. It imports the
standard library only. Invariant: ``reads`` is complete; a test runs every command and fails on a key that is read and
not declared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Command:
    """One command of ``steerlm``.

    Args:
        name: what users type.
        help: what it does, in a few words.
        module: the module of ``steerlm_megatron.stages`` whose ``run(config)`` executes the command.
        ranks: whether the command runs on the ranks that ``parallel.*`` asks for.
        reads: sections (``model``) and single keys (``data.on_error``) that its result depends on.
        needs: keys that must be set, and what each has to name.
        trains: whether the command lays out a training run.
        sets: keys that the command sets by itself for its steps, and accepts from nobody.
    """

    name: str
    help: str
    module: str
    ranks: bool
    reads: tuple[str, ...]
    needs: dict[str, str] = field(default_factory=dict)
    trains: bool = False
    sets: tuple[str, ...] = ()

    def reads_key(self, key: str) -> bool:
        """Return whether this command reads ``key`` (or, for a section, some key in it)."""
        return any(_covers(read, key) or read.startswith(f"{key}.") for read in (*_EVERY, *self.reads))


# Every command reads where it is to work, and whether it may replace a complete run there.
_EVERY = ("command", "run_dir", "overwrite")
_RANKS = ("parallel", "engine")
_CORPUS = ("data", "tokenizer", "template", "attributes", "train.seed")
_TRAINING = (
    "init_from", "model", *_RANKS, "optim", "lora", "train", *_CORPUS, "tracking", "profile", "plan.check",
)  # fmt: skip
_LIMITS = tuple(
    f"generation.{key}"
    for key in (
        "engine", "max_batch", "max_sequence_tokens", "max_cache_tokens", "memory_fraction", "block_tokens",
        "chunk_tokens", "admission", "cuda_graphs",
    )
)  # fmt: skip
_DRAWING = ("sampling", *_LIMITS, *_RANKS)
_KEYS = ("server.api_keys", "server.api_key_file")
_SERVERS = ("server.urls", "server.folder", "server.count", "server.wait_sec", *_KEYS, "generation.concurrency")
_SERVER = (
    *_KEYS,
    *(
        f"server.{key}"
        for key in (
            "host", "port", "folder", "max_queue", "model_name", "max_body_bytes", "read_timeout_sec",
            "idle_timeout_sec", "max_connections", "drain_sec", "access_log", "cors", "tls_cert", "tls_key",
            "root_path", "page",
        )
    ),
)  # fmt: skip
_RECORDS = ("input", "output", "data.on_error")
_BOOTSTRAP = tuple(
    f"bootstrap.{key}"
    for key in (
        "prompts", "responses_per_prompt", "combinations", "drop_truncated", "max_repetition", "repetition_ngram",
        "drop_duplicates", "labels", "max_distance", "keep_best", "best_by", "write_dropped",
    )
)  # fmt: skip
_ROUNDS = ("bootstrap.rounds", "bootstrap.mix")  # what only run does with bootstrapping
_STEERLM2 = ("steerlm2.iterations", "steerlm2.responses")

_TRAINED = "the run folder of train_sft, or one of its checkpoints"
_AP = "the run folder of train_ap, or one of its checkpoints"

_ALL = (
    Command(
        "preprocess", "records or a corpus → indexed binary shards", "preprocess", False,
        _CORPUS, {"data.output_dir": "the folder for the shards"},
    ),
    Command(
        "train_ap", "train the attribute-prediction model (step 1)", "train", True, (*_TRAINING, "ap"), trains=True
    ),
    Command(
        "annotate", "score every response of a record file (step 2)", "annotate", True,
        (*_RECORDS, "checkpoint", "attributes", "annotate", "array", "scoring", *_RANKS),
        {"input": "record files", "output": "the record file to write", "checkpoint": _AP},
    ),
    Command(
        "train_sft", "attribute-conditioned SFT, plain SFT with attributes=none (step 3)", "train", True,
        (*_TRAINING, "steerlm2.normalize"), trains=True,
    ),
    Command(
        "bootstrap", "sample at the best attribute values and score the responses (step 4)", "bootstrap", True,
        (*_RECORDS, "checkpoint", "ap_checkpoint", "array", *_BOOTSTRAP, "scoring", *_SERVERS, *_DRAWING),
        {
            "input": "annotated record files", "output": "the record file to write", "checkpoint": _TRAINED,
            "ap_checkpoint": _AP,
        },
    ),
    Command(
        "weigh", "weights of sampled responses, for SteerLM 2.0", "weigh", True,
        (
            *_RECORDS, "checkpoint", "array", "scoring.batch_tokens", *_RANKS,
            *(f"steerlm2.{key}" for key in ("base", "attributes", "concentration", "bins")),
        ),
        {
            "input": "record files of steerlm bootstrap", "output": "the record file to write",
            "checkpoint": "the model that the responses were drawn from", "steerlm2.base": "a plain SFT model",
        },
    ),
    Command(
        "serve", "OpenAI-compatible sampling server", "serve", True,
        ("checkpoint", "ap_checkpoint", "attributes", "scoring", *_SERVER, *_DRAWING), {"checkpoint": _TRAINED},
    ),
    Command(
        "generate", "sample responses for the prompts of a record file", "generate", True,
        (*_RECORDS, "checkpoint", "array", "attributes", *_SERVERS, *_DRAWING),
        {"input": "record files with prompts", "output": "the record file to write", "checkpoint": _TRAINED},
    ),
    Command(
        "evaluate", "attribute-prediction quality and steering curves", "evaluate", True,
        ("input", "data.on_error", "ap_checkpoint", "attributes", "evaluate", "scoring", *_DRAWING),
    ),
    Command(
        "export", "the model of a checkpoint alone, as a checkpoint", "export", True,
        ("checkpoint", "output", "export", *_RANKS),
        {"checkpoint": "a run folder or checkpoint", "output": "the folder to write"},
    ),
    Command(
        "report", "report.html, .md and .json of a run, or of several compared", "report", False,
        ("input",), {"input": "a run folder, or a list of them to compare: 'input=[runs/a,runs/b]'"},
    ),
)  # fmt: skip


def _run() -> Command:
    """Declare ``run``: the pipeline reads what its steps read, except the keys that steps pass on to each other."""
    sets = ("output", "checkpoint", "ap_checkpoint", "steerlm2.base")
    steps = [c for c in _ALL if c.name not in ("serve", "generate", "export")]
    reads = dict.fromkeys(read for c in steps for read in c.reads if read not in sets)
    reads_all = ("pipeline", "steps", *_ROUNDS, *_STEERLM2, "ablation", *reads)
    return Command("run", "all steps from one config", "pipeline", True, reads_all, trains=True, sets=sets)


COMMANDS: dict[str, Command] = {command.name: command for command in (*_ALL, _run())}

# These are about runs and jobs. They have no configuration file of their own: ``plan`` and ``launch`` take the command
# line of a command, with ``plan.*`` or ``cluster.*`` beside it; ``module`` is below ``steerlm_megatron``.
TOOLS: dict[str, Command] = {
    tool.name: tool
    for tool in (
        Command("plan", "memory and time of a command, before it runs", "stages.plan", False, ("plan",)),
        Command("chat", "talk with a served model in the terminal", "serve.chat", False, ()),
        Command("launch", "a command, or all steps of run, as SLURM jobs", "launch.submit", False, ("cluster",)),
        Command("status", "the jobs of a run, or of all runs here", "launch.status", False, ()),
        Command("cancel", "end the jobs of a run", "launch.status", False, ()),
        Command("logs", "the end of a run's log", "launch.status", False, ()),
    )
}


def _covers(read: str, key: str) -> bool:
    return key == read or key.startswith(f"{read}.")


def readers(key: str) -> list[str]:
    """Return the commands that read ``key``."""
    tools = [name for name, tool in TOOLS.items() if any(_covers(read, key) for read in tool.reads)]
    return [name for name, command in COMMANDS.items() if command.reads_key(key)] + tools


def declared(command: str, key: str) -> bool:
    """Return whether ``command`` declares that it reads ``key``; an unknown command is taken to read everything."""
    if command not in COMMANDS:
        return True
    about = COMMANDS[command]
    return any(_covers(read, key) for read in (*_EVERY, *about.reads, *about.sets))


# These keys change how a command runs and nothing in its result.
_WITHOUT_EFFECT = (
    "command", "run_dir", "overwrite", "tracking", "profile", "data.workers", "data.verify", "pipeline", "steps",
    "array", "server.urls", "server.folder", "server.count", "server.wait_sec", "server.api_keys",
    "server.api_key_file", "plan",
)  # fmt: skip


def affects_result(command: str, key: str) -> bool:
    """Return whether the result of ``command`` depends on ``key``."""
    return declared(command, key) and not any(_covers(one, key) for one in _WITHOUT_EFFECT)


def unread(command: str, keys: Iterable[str]) -> list[str]:
    """Return one sentence per key of a command line that ``command`` does not read, with the commands that do."""
    problems = []
    for key in keys:
        if not COMMANDS[command].reads_key(key):
            others = readers(key)
            remedy = f"; {_listed(others)} {'does' if len(others) == 1 else 'do'}" if others else ""
            problems.append(f"{key}: {command} does not read it{remedy}")
    return problems


def unset(command: str, value_of: Callable[[str], object]) -> list[str]:
    """Return one sentence per key that ``command`` needs and that has no value; ``value_of`` gives a key's value."""
    if command not in COMMANDS:
        return []
    return [f"{key} is not set: name {what}" for key, what in COMMANDS[command].needs.items() if value_of(key) is None]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
