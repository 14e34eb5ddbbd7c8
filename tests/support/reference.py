"""Reference sessionizer: slow, pure Python, row by row, sharing no code with `etl`."""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

BITS = {"like": 1, "share": 2, "follow": 4, "read": 8, "favorite": 16}
NUMBERS = ("user_id", "item_id", "click", *BITS, "watching_times", "gender", "age")
PLURAL = {"likes": "like", "shares": "share", "follows": "follow", "reads": "read", "favorites": "favorite"}


@dataclass
class Options:
    clicked_only: bool = False
    min_clicks: int = 10
    max_clicks: int = 30
    dedupe: str = "none"
    min_item_clicks: int = 1
    max_item_clicks: int | None = None
    first_users: int | None = None
    first_rows: int | None = None
    exposures: bool = True


@dataclass
class Expected:
    sessions: dict[int, dict[str, Any]] = field(default_factory=dict)
    items: list[dict[str, Any]] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)


def read_rows(texts: list[str], first_rows: int | None) -> list[dict[str, Any]]:
    """All rows of well-formed logs, in order."""
    rows = []
    for text in texts:
        for raw in csv.DictReader(text.splitlines()):
            if first_rows is not None and len(rows) == first_rows:
                return rows
            for name in ("click", *BITS):
                raw[name] = {"True": "1", "False": "0"}.get(raw.get(name, ""), raw.get(name, ""))
            row = {name: value_of(text) for name, text in raw.items()}
            row["raw"] = tuple(sorted(row.items(), key=lambda pair: pair[0]))
            for name in NUMBERS:
                row[name] = None if row.get(name) is None else int(row[name])
            row["category"] = category_of(raw.get("video_category", raw.get("category_second", "")))
            row["bits"] = sum(bit for action, bit in BITS.items() if row.get(action))
            rows.append(row)
    return rows


def value_of(text: str) -> int | Decimal | str | None:
    """The value of a field, independent of its spelling."""
    plain = text.strip(" \t")
    if plain in ("", "\\N"):
        return None
    if not re.fullmatch(r"-?[0-9]+(\.[0-9]*)?", plain):
        return text
    number = Decimal(plain)
    return int(number) if number == int(number) else number


def category_of(text: str) -> str | None:
    """A category's name: its text, or the shortest spelling of its number."""
    value = value_of(text)
    return f"{value:f}".rstrip("0") if isinstance(value, Decimal) else None if value is None else str(value)


def sessionize(texts: list[str], options: Options) -> Expected:
    rows = read_rows(texts, options.first_rows)
    columns = set(texts[0].splitlines()[0].split(","))
    expected = Expected(raw=statistics(rows, columns))
    profile: dict[int, dict[str, int]] = defaultdict(lambda: {"gender": -1, "age": -1})
    for row in rows:
        for name in ("gender", "age"):
            if row[name] is not None:
                profile[row["user_id"]][name] = row[name]
    if options.clicked_only:
        rows = [row for row in rows if row["click"]]
    rows = deduped(rows, options.dedupe)
    clicks_of = Counter(row["item_id"] for row in rows if row["click"])
    most = options.max_item_clicks if options.max_item_clicks is not None else 10**18
    least = options.min_item_clicks if options.min_item_clicks > 1 else 0
    rows = [row for row in rows if least <= clicks_of[row["item_id"]] <= most]
    if options.first_users is not None:
        users = sorted({row["user_id"] for row in rows})[: options.first_users]
        rows = [row for row in rows if row["user_id"] in set(users)]
    by_user = defaultdict(list)
    for row in rows:
        by_user[row["user_id"]].append(row)
    kept_rows: list[dict[str, Any]] = []
    places = []
    lost = Counter(before_first=0, after_test=0)
    for user in sorted(by_user):
        session = cut(by_user[user], options)
        if session:
            expected.sessions[user] = session["lists"] | profile[user]
            kept_rows += session["rows"] if options.exposures else session["clicks"]
            lost["before_first"] += session["before_first"]
            lost["after_test"] += session["after_test"]
            places += [
                (row["item_id"], position <= len(session["clicks"]) - 2)
                for position, row in enumerate(session["clicks"], 1)
            ]
    expected.items = item_table(kept_rows, places)
    for session in expected.sessions.values():
        session["n_kept"] = len(session["items"])
    expected.kept = statistics(kept_rows, columns) | dict(lost)
    return expected


def deduped(rows: list[dict[str, Any]], how: str) -> list[dict[str, Any]]:
    seen: set[Any] = set()
    out = []
    for row in rows:
        key = (
            row["raw"]
            if how == "exact"
            else (row["user_id"], row["item_id"])
            if how == "first" and row["click"]
            else None
        )
        if key is not None and key in seen:
            continue
        seen.add(key)
        out.append(row)
    return out


def cut(rows: list[dict[str, Any]], options: Options) -> dict[str, Any] | None:
    clicks = [row for row in rows if row["click"]]
    if len(clicks) < options.min_clicks:
        return None
    kept = clicks[-options.max_clicks :]
    if not options.exposures:
        rows = clicks
    first = next(number for number, row in enumerate(rows) if row is kept[0])
    shown, position = [], 0
    for row in rows[first:]:
        shown.append((row, position))  # number of clicks before the row; after the last click that of all clicks
        position += bool(row["click"])
    listed = shown if options.exposures else []
    return {
        "clicks": kept,
        "before_first": first,
        "after_test": sum(position == len(kept) for _, position in shown),
        "rows": [row for row, _ in shown],
        "lists": {
            "items": [row["item_id"] for row in kept],
            "feedback": [row["bits"] for row in kept],
            "watching_times": [row["watching_times"] or 0 for row in kept],
            "n_clicks": len(clicks),
            "exposure_items": [row["item_id"] for row, _ in listed],
            "exposure_position": [position for _, position in listed],
            "exposure_feedback": [row["bits"] | (128 if row["click"] else 0) for row, _ in listed],
        },
    }


def item_table(rows: list[dict[str, Any]], places: list[tuple[int, bool]]) -> list[dict[str, Any]]:
    shown = Counter(row["item_id"] for row in rows)
    clicks = Counter(item for item, _ in places)
    train = Counter(item for item, is_train in places if is_train)
    categories: dict[int, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row["category"] is not None:
            categories[row["item_id"]][row["category"]] += 1
    table = []
    for dense, item in enumerate(sorted(shown, key=lambda i: (-train[i], i)), 1):
        actual = sorted(categories[item].items(), key=lambda pair: (-pair[1], pair[0].encode()))
        table.append(
            {
                "item": dense,
                "item_id": item,
                "train_clicks": train[item],
                "clicks": clicks[item],
                "exposures": shown[item],
                "category": actual[0][0] if actual else None,
            }
        )
    return table


def statistics(rows: list[dict[str, Any]], columns: set[str]) -> dict[str, Any]:
    return {
        "users": len({row["user_id"] for row in rows}),
        "items": len({row["item_id"] for row in rows}),
        "clicks": sum(row["click"] for row in rows),
        **{
            plural: sum(bool(row["bits"] & BITS[name]) for row in rows) if name in columns else None
            for plural, name in PLURAL.items()
        },
        "exposures": len(rows),
        "skip": sum(not row["click"] and not row["bits"] for row in rows),
        "entered": sum(not row["click"] and not row["bits"] and (row["watching_times"] or 0) >= 1 for row in rows)
        if "watching_times" in columns
        else None,
        "passive": sum(bool(row["click"]) and not row["bits"] for row in rows),
        "other": sum(not row["click"] and bool(row["bits"]) for row in rows),
    }
