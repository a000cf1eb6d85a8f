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
    old: dict[str, Any], new: dict[str, Any], may_differ: Collection[str] = ()
) -> list[str]:
    """`field: old -> new` for each field that differs, fields of nested objects as `a.b`."""
    before, now = _flat(old), _flat(new)
    return [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if name not in may_differ and before.get(name) != now.get(name)
    ]
