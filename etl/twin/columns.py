"""Generates the columns of a log from the rows of a twin: profiles, categories, counts and scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from etl.logs.tenrec import NULL, SCENARIOS
from etl.logs.tenrec_published import AGES, GENDERS, NULL_CATEGORIES, SCANNED, VIDEO_CATEGORIES
from etl.runtime.arrays import FloatArray, IntArray
from etl.twin.process import TOPICS, hashed
from etl.twin.raw_ids import item_ids, user_ids
from etl.twin.simulate import USERS_PER_CHUNK, Twin

HINT = 0.35
"""Deviation of a topic's share of category 1 from the mean: each topic prefers one of the two."""
GROUP = 4
"""Number of topics per first category of articles."""
RIGHT_GROUP, RIGHT_TOPIC = 0.85, 0.7
"""Shares of articles whose first or second category is that of their topic."""
GENDER_CHANGES_AFTER = 3
"""Number of clicks after which users with two genders switch."""
# Salts of the hashes, so that columns are independent.
GENDER, AGE, CHANGING, MISSING, VIDEO, FIRST, SECOND, OTHER, COUNTS = range(200, 209)


def columns(twin: Twin, chunk: int, rows: dict[str, Any]) -> list[pa.Array]:
    """The scenario's columns in the order of its header."""
    names = SCENARIOS[twin.scenario].columns
    article = "category_second" in names
    user, item = rows["user"] + chunk * USERS_PER_CHUNK, rows["rank"]
    made: dict[str, Any] = {
        "user_id": user_ids(twin.scenario, twin.users).of(user),
        "item_id": item_ids(twin.scenario, twin.process.items).of(scatter(item, twin.process.items)),
        "gender": genders(twin, user, rows["position"]),
        "age": _drawn(AGES, hashed(user, twin.process.seed * 100 + AGE)),
    }
    flags = {name: values for name, values in rows.items() if name not in ("user", "position", "rank")}
    if article:
        written = pa.array(["0.0", "1.0"])
        made |= {name: written.take(pa.array(values)) for name, values in flags.items() if name != "watching_times"}
        first, second = article_categories(twin, item)
        made |= {"category_first": _text(first + 1), "category_second": _null_some(twin, user, item, second + 100)}
        made |= _article_values(twin, user, item, rows)
    else:
        made |= flags
        code = item % TOPICS + 100 if twin.observed_topics else video_category(twin, item)
        made["video_category"] = _null_some(twin, user, item, code)
    empty = np.zeros(len(item), np.int8)
    return [pa.array(made.get(name, empty)) for name in names]


def genders(twin: Twin, user_N: IntArray, position_N: IntArray) -> IntArray:
    """Gender of rows: that of the user; for some users of article logs it changes after a few clicks."""
    gender = _drawn(GENDERS, hashed(user_N, twin.process.seed * 100 + GENDER))
    changing = hashed(user_N, twin.process.seed * 100 + CHANGING) < SCANNED[twin.scenario].changing_gender
    return (gender + (changing & (position_N > GENDER_CHANGES_AFTER))) % len(GENDERS)


def video_category(twin: Twin, item_N: IntArray) -> IntArray:
    """Category 0 or 1 of videos: each topic prefers one of them."""
    lean = np.where((item_N % TOPICS) // 2 % 2 == 0, HINT, -HINT)
    return (hashed(item_N, twin.process.seed * 100 + VIDEO) < VIDEO_CATEGORIES[1] + lean).astype(np.int64)


def article_categories(twin: Twin, item_N: IntArray) -> tuple[IntArray, IntArray]:
    """First category (a group of topics) and second category (a topic) of articles: noisy, unless `observed_topics`."""
    topic, seed = item_N % TOPICS, twin.process.seed * 100
    if twin.observed_topics:
        return topic // GROUP, topic
    other = (hashed(item_N, seed + OTHER) * TOPICS).astype(np.int64)
    first = np.where(hashed(item_N, seed + FIRST) < RIGHT_GROUP, topic // GROUP, other // GROUP)
    second = np.where(hashed(item_N, seed + SECOND) < RIGHT_TOPIC, topic, topic // GROUP * GROUP + other % GROUP)
    return first, second


def _article_values(twin: Twin, user_N: IntArray, item_N: IntArray, rows: dict[str, Any]) -> dict[str, Any]:
    """Synthetic counts and scores of items, and reading depth and duration of articles by a user."""
    seed = twin.process.seed * 100 + COUNTS
    popular = 1 + (1e6 / (1 + item_N) ** 0.5).astype(np.int64)
    made: dict[str, Any] = {"exposure_count": popular * 20, "click_count": popular}
    for number, name in enumerate(("like_count", "comment_count")):
        made[name] = (popular * hashed(item_N, seed + number) / 50).astype(np.int64)
    for number, name in enumerate(("item_score1", "item_score2", "item_score3")):
        made[name] = np.round(hashed(item_N, seed + 2 + number), 4)
    times = rows["watching_times"]
    read = rows.get("read", np.ones(len(item_N), np.int8)) == 1
    # Above 100: read again. An article that does not count as read may have been read in part.
    # By user and item, so that duplicates of a row remain duplicates.
    depth = hashed(user_N * twin.process.items + item_N, seed + 5)
    percentage = np.where(read, 30 + 70 * depth, 25 * depth) + 100 * (times - 1) * read
    made["read_percentage"] = percentage.astype(np.int64)
    made["read_time"] = (percentage * (1 + depth)).astype(np.int64)
    return made


def _null_some(twin: Twin, user_N: IntArray, item_N: IntArray, code_N: IntArray) -> pa.Array:
    """Codes as text, null for some (user, item) pairs, so that duplicates of a row remain duplicates."""
    missing = hashed(user_N * twin.process.items + item_N, twin.process.seed * 100 + MISSING) < NULL_CATEGORIES
    return _text(np.where(missing, -1, code_N))


def _text(code_N: IntArray) -> pa.Array:
    """Small codes as text; -1 is null."""
    words = pa.array([NULL, *map(str, range(int(code_N.max(initial=0)) + 1))])
    return words.take(pa.array(code_N + 1))


def _drawn(shares: tuple[float, ...], uniform_N: FloatArray) -> IntArray:
    return np.searchsorted(np.cumsum(shares)[:-1], uniform_N, side="right")


def scatter(rank_N: IntArray, items: int) -> IntArray:
    """Item numbers unrelated to popularity: a bijection of 0..items-1."""
    step = int(items * 0.618)
    while np.gcd(step, items) != 1:
        step += 1
    return (rank_N * step + items // 3) % items
