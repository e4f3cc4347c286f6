"""``lrc check``: sizes, bytes and memory that a plan gives for a model, from headers alone."""

from __future__ import annotations

from lrc.cli.options import AllowPickle, AsJson, Model, PlanName, RemoteCode, Revision
from lrc.cli.screen import quiet, show, show_json


def check_model(
    model: Model,
    plan: PlanName,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Resolve a plan against MODEL: ranks, parameters, bytes, GPU memory. No weight is loaded."""
    quiet()
    from lrc.plan.job import prepare
    from lrc.report.tables import resolution
    from lrc.verbs.check import check

    job = prepare(
        model, plan, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
    )
    found = check(job)
    if as_json:
        show_json(found)
    else:
        show(*resolution(found))
