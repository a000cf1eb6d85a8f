"""What differs between two configs."""

from collections.abc import Collection
from typing import Any


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def differences(
    old: dict[str, Any],
    new: dict[str, Any],
    may_differ: Collection[str] = (),
    defaults: dict[str, Any] | None = None,
) -> list[str]:
    """`field: old -> new` for each field that differs, fields of nested objects as `a.b`.

    defaults: the values of fields that an older config does not have yet.
    """
    now = _flat(new)
    since = {name: value for name, value in _flat(defaults or {}).items() if name in now}
    before = since | _flat(old)
    return [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if name not in may_differ and before.get(name) != now.get(name)
    ]
