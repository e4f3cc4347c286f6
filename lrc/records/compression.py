"""The result of ``lrc compress``: a versioned record that can be read back."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lrc.checkpoint.sizes import Size, byte_text
from lrc.compression.logit_scale import LogitScale
from lrc.compression.measure import Measured
from lrc.compression.norms import StreamNorms
from lrc.compression.ridge import RefitRecord
from lrc.errors import UserError
from lrc.evaluation.answers import Answers
from lrc.evaluation.bootstrap import few
from lrc.evaluation.last_words import LastWords
from lrc.evaluation.pair import TokenByToken
from lrc.evaluation.perplexity import Perplexity
from lrc.methods.contract import Prediction
from lrc.methods.sizes import SizeValue
from lrc.plan.resolved import Share
from lrc.records.number import number, ratio_text

REPORT = "report.json"
REPORT_VERSION = 5
_RAN = 1e-3  # seconds
_WELL, _RISE, _MOST_RISE = 1.25, 1.5, 4.0


@dataclass(frozen=True)
class PerplexityChange:
    """Perplexity of the original and of the saved, reloaded output on the same windows.

    ``tokens``: the output compared with the original token by token, with intervals; None in reports of earlier lrc.
    """

    before: Perplexity
    after: Perplexity
    tokens: TokenByToken | None = None

    @property
    def ratio(self) -> float:
        """After over before."""
        return self.after.value / self.before.value

    @property
    def sureness(self) -> str:
        """What stands in brackets behind the ratio: its interval, and the windows where they are few; or nothing."""
        interval = self.tokens and self.tokens.perplexity_ratio.between(ratio_text)
        parts = [f"95 % interval {interval}" if interval else "", few(self.before.windows)]
        return ", ".join(part for part in parts if part)

    @property
    def notes(self) -> list[str]:
        """Caveats of the text and of the intervals."""
        return [*self.after.notes, *(self.tokens.notes(self.before) if self.tokens else ())]


@dataclass(frozen=True)
class Domains:
    """The cost by domain, on small texts of the package; ``skipped``: why other domains are missing."""

    changes: dict[str, PerplexityChange] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @property
    def ratios(self) -> dict[str, float]:
        """The ratios by domain, the least first; a perplexity that is no number counts as infinite."""
        found = {name: change.ratio for name, change in self.changes.items()}
        found = {name: math.inf if math.isnan(ratio) else ratio for name, ratio in found.items()}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    @property
    def much_worse(self) -> list[str]:
        """The domains that the original predicts well and the output predicts much worse.

        The original predicts a domain well if its bits per byte are at most 1.25 times the median over domains. The
        output predicts one much worse if its perplexity rose by more than half and by more than the square of the least
        ratio, or by more than four times.
        """
        if not self.changes:
            return []
        bits = {name: change.before.bits_per_byte or math.inf for name, change in self.changes.items()}
        well = _WELL * median(bits.values())
        least = max(_RISE, min(min(self.ratios.values()) ** 2, _MOST_RISE))
        return [name for name in self.changes if bits[name] <= well and self.ratios[name] > least]

    @property
    def warnings(self) -> list[str]:
        """A warning for each domain that is much worse."""
        return [
            f"{name}: perplexity rises from {number(change.before.value)} to {number(change.after.value)}, × "
            f"{ratio_text(change.ratio)}; keep more, or calibrate on text of this kind too"
            for name, change in self.changes.items()
            if name in self.much_worse
        ]

    @property
    def summary(self) -> str:
        """The domains of the least and of the largest cost, in a sentence."""
        ends = [f"× {ratio_text(ratio)} ({name})" for name, ratio in self.ratios.items()]
        if not ends:
            return ""
        return f"By domain, perplexity rises {' to '.join(dict.fromkeys((ends[0], ends[-1])))}."


@dataclass(frozen=True)
class TargetRecord:
    """One target shrunk to ``kept`` of ``whole`` weights; ``layer`` is None outside the layers.

    ``predicted`` and ``measured`` are errors; ``numerics`` is what the solver reports, such as its damping.
    """

    target: str
    method: str
    size: SizeValue
    options: dict[str, Any]
    kept: int
    whole: int
    layer: int | None
    predicted: Prediction
    numerics: dict[str, int | float]
    measured: Measured


@dataclass(frozen=True)
class CalibrationSource:
    """One calibration text; ``start`` and ``temperature`` if the model itself wrote it.

    ``origin``: the hub's repository, or the file by its name in the data folder.
    """

    data: str
    blocks: int
    weight: float | None = None
    text_sha256: str | None = None
    origin: str | None = None
    start: int | None = None
    temperature: float | None = None
    ids_sha256: str | None = None


@dataclass(frozen=True)
class CalibrationRecord:
    """The calibration blocks, drawn by ``seed``; ``gradient_samples`` of them for gradients, if any.

    ``first_token``: the weight of a block's first token in moments and errors. ``first_id``: the token that every block
    starts with, if the model needs one.
    """

    data: str
    samples: int
    seq_len: int
    seed: int
    sources: list[CalibrationSource]
    ids_sha256: str
    first_token: int
    gradient_samples: int | None = None
    first_id: int | None = None


@dataclass(frozen=True)
class Report:
    """One compression.

    ``model``: as the user named it. ``fingerprint``: of the tensors' headers and a sample of their values.
    ``plan``: its name; ``plan_text``: as the user wrote it. ``keep``: kept fraction of the decoder's projections;
    ``with_tables``: with the tables that the plan names, if any. ``stream_norms``: by layer, empty without a refit.
    ``scale``: of the logits. ``allocation``: how sizes were found, None if the plan gives them. ``offload``: where
    hidden states waited between two layers. ``seconds`` and (on a GPU) ``device_bytes``, its peak memory, by stage;
    ``peak_bytes`` of ``host`` and ``device``: sums and maxima over all processes of a run that was resumed.
    ``pending``: texts whose perplexity is still to be measured. ``domains``: the cost by domain. ``last_words``: None
    if the data folder has no LAMBADA. ``answers``: to a few prompts, before and after; None if nothing was evaluated.
    """

    model: str
    revision: str | None
    fingerprint: str
    layers: int
    plan: str
    plan_text: str
    out: str
    keep: float
    with_tables: Share | None
    before: Size
    after: Size
    perplexity: list[PerplexityChange]
    targets: list[TargetRecord]
    refits: list[RefitRecord]
    stream_norms: list[StreamNorms]
    scale: LogitScale | None
    calibration: CalibrationRecord
    allocation: dict[str, Any] | None
    device: str
    dtype: str
    batch_size: int
    processes: int
    offload: str
    seconds: dict[str, float]
    device_bytes: dict[str, int]
    peak_bytes: dict[str, int]
    warnings: list[str]
    versions: dict[str, str]
    pending: list[str] = field(default_factory=list)
    domains: Domains = field(default_factory=Domains)
    last_words: LastWords | None = None
    answers: Answers | None = None
    version: int = REPORT_VERSION

    @property
    def methods(self) -> list[str]:
        """The methods used, each once."""
        return list(dict.fromkeys(record.method for record in self.targets))

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of the stages that ran: a stage with nothing to do takes microseconds."""
        return {stage: seconds for stage, seconds in self.seconds.items() if seconds >= _RAN}

    @property
    def sentence(self) -> str:
        """What was done and what it cost, in a sentence or two."""
        done = (
            f"{self.model} was compressed by the plan {self.plan} to {self.keep:.1%} of its decoder's weights: "
            f"{byte_text(self.after.bytes)} instead of {byte_text(self.before.bytes)}"
        )
        if not self.perplexity:
            return f"{done}. {self.unmeasured}"
        costs = []
        for change in self.perplexity:
            values = f"{number(change.after.value)} instead of {number(change.before.value)}"
            sure = f" ({change.sureness})" if change.sureness else ""
            costs.append(f"{values} on {change.before.data}, × {ratio_text(change.ratio)}{sure}")
        return f"{done}. Perplexity is {'; '.join(costs)}. {self.domains.summary}".rstrip()

    @property
    def unmeasured(self) -> str:
        """Why there is no perplexity."""
        if self.pending:
            return f"The perplexity on {' and '.join(self.pending)} is pending: it is measured next."
        return "Perplexity was not measured; lrc eval does it."

    def to_json(self) -> str:
        """Return the record as JSON."""
        return json_text(asdict(self))


REPORTS: TypeAdapter[Report] = TypeAdapter(Report)


def read_report(folder: str | Path) -> Report:
    """Read the report of an output folder. Raises UserError if there is none, or it has another version or damage."""
    path = Path(folder) / REPORT
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no {REPORT}, which lrc compress writes into its outputs") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged, it is not JSON: {error}") from error
    version = record.get("version") if isinstance(record, dict) else None
    if version != REPORT_VERSION:
        found = "no version" if version is None else f"version {version!r}"
        raise UserError(
            f"{path} has {found} of the report; this lrc reads version {REPORT_VERSION}: compress again, or read "
            "it with the lrc that wrote it"
        )
    try:
        return REPORTS.validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is damaged at {place}: {first['msg']}") from error


def json_text(value: Any) -> str:
    """Return a value as JSON, with infinite and NaN numbers as strings."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return str(value)
    return value
