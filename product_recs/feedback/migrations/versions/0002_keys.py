"""Ids become keys: `i12`, `s12` and `s12.0` were three people, and are one, `12`.

What was kept twice becomes one: of two wishes to be forgotten the later counts, of two words about an item the last,
and of an item that was denied and allowed again the last word that is still there. What somebody could keep who had
asked to be forgotten, because a wish had missed it, goes. Stop the workers of the older version first.
"""

import re

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def table(name: str, *columns: str) -> sa.TableClause:
    "A table as this migration finds it, whatever later ones make of it."
    types = {"seq": sa.BigInteger, "at": sa.BigInteger, "id": sa.BigInteger, "available": sa.Boolean, "items": sa.JSON}
    return sa.table(name, *(sa.column(column, types.get(column, sa.Text)) for column in columns))


EVENTS = table("events", "seq", "user_id", "item_id", "event")
DENIED = table("denied", "user_id", "item_id")
FORGOTTEN = table("forgotten", "user_id", "at", "seq")
AVAILABILITY = table("availability", "item_id", "available", "at", "seq")
IMPRESSIONS = table("impressions", "id", "user_id", "at", "items")
PAGE = 10_000


def key_of(text: str) -> str:
    "The key behind an id of the first version: one letter for its type, then the id."
    return key_of_id(text[1:])


def key_of_id(text: str) -> str:
    return text[:-2] if re.fullmatch(r"(0|-?[1-9][0-9]*)\.0", text) else text


def upgrade() -> None:
    connection = op.get_bind()
    for name in ("user_id", "item_id"):
        rename_events(connection, EVENTS.c[name])
    forgotten = merge_forgotten(connection)
    merge_denied(connection, forgotten)
    merge_availability(connection)
    change_impressions(connection, forgotten)


def rename_events(connection, column) -> None:
    "One statement takes the letters off; the few ids that pandas wrote follow one by one."
    connection.execute(sa.update(EVENTS).values({column.name: sa.func.substr(column, 2)}))
    odd = connection.scalars(sa.select(column).where(column.like("%.0")).distinct()).all()
    for text in odd:
        connection.execute(sa.update(EVENTS).where(column == text).values({column.name: key_of_id(text)}))


def replace_all(connection, table, rows) -> None:
    connection.execute(sa.delete(table))
    if rows:
        connection.execute(sa.insert(table), rows)


def merge_forgotten(connection) -> dict:
    "The later of two wishes; events from before it go. Gives key -> moment."
    latest = {}
    for row in connection.execute(sa.select(FORGOTTEN).order_by(FORGOTTEN.c.seq)):
        latest[key_of(row.user_id)] = dict(user_id=key_of(row.user_id), at=row.at, seq=row.seq)
    replace_all(connection, FORGOTTEN, list(latest.values()))
    for row in latest.values():
        connection.execute(sa.delete(EVENTS).where(EVENTS.c.user_id == row["user_id"], EVENTS.c.seq < row["seq"]))
    return {key: row["at"] for key, row in latest.items()}


def merge_denied(connection, forgotten: dict) -> None:
    "What is denied is what was said last of it; of who was forgotten only what was said after the wish."
    pairs = {(key_of(row.user_id), key_of(row.item_id)) for row in connection.execute(sa.select(DENIED))}
    said = sa.select(EVENTS.c.user_id, EVENTS.c.item_id, EVENTS.c.event).where(EVENTS.c.event.in_(["deny", "undeny"]))
    last = {(row.user_id, row.item_id): row.event for row in connection.execute(said.order_by(EVENTS.c.seq))}
    kept = [pair for pair in sorted(pairs) if last.get(pair, "undeny" if pair[0] in forgotten else "deny") == "deny"]
    replace_all(connection, DENIED, [dict(user_id=user, item_id=item) for user, item in kept])


def merge_availability(connection) -> None:
    latest = {}
    for row in connection.execute(sa.select(AVAILABILITY).order_by(AVAILABILITY.c.seq)):
        key = key_of(row.item_id)
        latest[key] = dict(item_id=key, available=row.available, at=row.at, seq=row.seq)
    replace_all(connection, AVAILABILITY, list(latest.values()))


def change_impressions(connection, forgotten: dict) -> None:
    "The users and the items of each answer as keys, a page at a time; an answer from before a wish goes."
    last = 0
    this = IMPRESSIONS.c.id == sa.bindparam("row")
    change = (
        sa.update(IMPRESSIONS)
        .where(this)
        .values(user_id=sa.bindparam("user"), items=sa.bindparam("keys", type_=sa.JSON))
    )
    page = sa.select(IMPRESSIONS).where(IMPRESSIONS.c.id > sa.bindparam("last")).order_by(IMPRESSIONS.c.id).limit(PAGE)
    while rows := connection.execute(page, {"last": last}).all():
        changed, gone = [], []
        for row in rows:
            user = None if row.user_id is None else key_of(row.user_id)
            if row.at <= forgotten.get(user, -1):
                gone.append({"row": row.id})
            else:
                changed.append({"row": row.id, "user": user, "keys": [key_of_id(str(item)) for item in row.items]})
        if changed:
            connection.execute(change, changed)
        if gone:
            connection.execute(sa.delete(IMPRESSIONS).where(this), gone)
        last = rows[-1].id
