"""All cases."""

from sslfast.bench import contrastive, patches, prototypes
from sslfast.bench.case import Case

CASES: tuple[Case, ...] = (*contrastive.CASES, *prototypes.CASES, *patches.CASES)
BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES)


def chosen(names: tuple[str, ...]) -> list[Case]:
    """The cases of these ops, all without a name.

    Raises:
        ValueError: there is no such op.
    """
    known = {case.op for case in CASES}
    for name in names:
        if name not in known and name not in BY_NAME:
            raise ValueError(f"op: expected one of {', '.join(sorted(known))}, got {name!r}")
    return [case for case in CASES if not names or case.op in names or case.name in names]
