"""The reference of the site, written from the code: settings, parameters, metrics, HTTP, the command line."""

import inspect
import json
import re
import tempfile
from pathlib import Path
from typing import get_args

import nbformat
import typer
from papermill import inspect_notebook
from prometheus_client.parser import text_string_to_metric_families

from product_recs.api import create_app
from product_recs.core.settings import Settings
from product_recs.evaluation import metrics
from product_recs.jobs.cli import app
from product_recs.jobs.pipeline import STEPS
from product_recs.web import monitor

ROOT = Path(__file__).resolve().parent.parent


def cell(text: object) -> str:
    "Text for a cell of a table."
    return str(text).replace("|", "\\|").replace("\n", " ").strip()


def table(head: str, rows: list[tuple]) -> str:
    "A table in Markdown; `head` has the names of its columns, apart by |."
    names = head.split("|")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *(f"| {' | '.join(map(cell, row))} |" for row in rows)])


def anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def named(name: str, *facts: str) -> str:
    "A name with its type and default below it: one column, so that a table fits a phone."
    small = " · ".join(fact for fact in facts if fact)
    return f"`{name}`" + (f"<br><small>{small}</small>" if small else "")


def type_words(annotation: object) -> str:
    if choices := [choice for choice in get_args(annotation) if isinstance(choice, str)]:
        return ", ".join(f"`{choice}`" for choice in choices)
    return {"Path": "path"}.get(getattr(annotation, "__name__", ""), str(getattr(annotation, "__name__", annotation)))


def settings() -> str:
    rows = []
    for name, field in Settings.model_fields.items():
        bounds = [
            f"{sign} {getattr(bound, key)}"
            for bound in field.metadata
            for key, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
            if getattr(bound, key, None) is not None
        ]
        kind = type_words(field.annotation) if not str(field.annotation).startswith("list") else "list, as JSON"
        default = json.dumps(field.default) if isinstance(field.default, list) else str(field.default)
        rows.append(
            (
                named(
                    f"{Settings.model_config['env_prefix']}{name.upper()}",
                    ", ".join([kind, *bounds]),
                    f"default `{default}`" if default else "default empty",
                ),
                field.description or "",
            )
        )
    return f"""# Settings

Each setting of the service and of the command line is an environment variable. A value that cannot be is refused at
the start, with its name. A name that is no setting does nothing: compare with this table.
[core/settings](../../nbs/core/settings.ipynb) is where they are declared.

{table("variable|what it sets", rows)}

`PRODUCT_RECS_ROOT` names the project's folder where the command runs elsewhere
([core/paths](../../nbs/core/paths.ipynb)).
MLflow's own variables, such as `MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME`, count as MLflow documents them.
"""


def parameters() -> str:
    parts, paths = [], {}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        if any("parameters" in part.metadata.get("tags", []) for part in notebook.cells):
            paths[path.relative_to(ROOT / "nbs").with_suffix("").as_posix()] = path
    order = [*(name for name in STEPS if name in paths), *(name for name in paths if name not in STEPS)]
    for name in order:
        rows = [
            (f"`{parameter}`", f"`{facts['default']}`", facts["help"])
            for parameter, facts in inspect_notebook(str(paths[name])).items()
        ]
        title = paths[name].stem
        parts.append(
            f"## {title}\n\nOf [{title}](../../nbs/{name}.ipynb).\n\n{table('parameter|default|what it sets', rows)}"
        )
    return f"""# Parameters

The parameters of the jobs. Each job is a notebook with one cell of parameters. `product-recs run` gives a parameter to
every step that has it (`-p NAME VALUE`, or a line `NAME: VALUE` of a file that `-f` names), and
`product-recs run --list-parameters` prints those of its steps. papermill takes the same names:
`papermill nbs/03_train.ipynb reports/03_train.ipynb -p model ALS`.

{chr(10).join(part + chr(10) for part in parts)}"""


def quality() -> str:
    def definition(function) -> str:
        return (inspect.getdoc(function) or "").split("\n\n")[0]

    rows = [
        (f"`{name}@k`", metrics.METRIC_NAMES[name], definition(function)) for name, function in metrics.METRICS.items()
    ]
    lists = [
        (f"`{function.__name__}`", definition(function))
        for function in (
            metrics.coverage,
            metrics.gini,
            metrics.novelty,
            metrics.category_diversity,
            metrics.cosine_diversity,
        )
    ]
    sure = [
        (f"`{function.__name__}`", definition(function))
        for function in (metrics.bootstrap_means, metrics.interval, metrics.paired_bootstrap)
    ]
    return f"""# Metrics of quality

What the evaluation, the competition and the gate measure. The whole catalogue is ranked, for two tasks apart:
*discovery*, items new to the user, and *next purchase*, where repeated buying counts.
[evaluation/metrics](../../nbs/evaluation/metrics.ipynb) shows each on lists whose value is known.

## Of each user's list

The value of a metric is its mean over the users who have something relevant in the period that is judged.

{table("in files|in reports|definition", rows)}

## Of all lists together

{table("name|definition", lists)}

## How sure it is

{table("function|what it gives", sure)}
"""


def prometheus() -> str:
    rows = {}
    made = monitor.Metrics()
    made.model.taken_up("VERSION", "2026-01-01T00:00:00+00:00", 1, 1)
    made.observe("/popular", "GET", 200, 0.001)
    made.recommended("popular", shortfall=True)
    made.store_up("sqlite", True)
    check = {"name": "CHECK", "level": "fine", "value": 1.0}
    judged = monitor.verdict_text({"GROUP": {"at": "2026-01-01T00:00:00+00:00", "checks": [check]}})
    for family in text_string_to_metric_families(made.body().decode() + judged):
        labels = sorted({label for sample in family.samples for label in sample.labels if label != "le"})
        name = family.name + ("_total" if family.type == "counter" and not family.name.endswith("_total") else "")
        known = sorted(
            {sample.labels[label] for sample in family.samples for label in labels if label in ("result", "operation")}
        )
        rows[name] = (
            f"`{name}`",
            family.type,
            ", ".join(f"`{label}`" for label in labels),
            family.documentation + (f": {', '.join(f'`{value}`' for value in known)}" if known else ""),
        )
    return f"""# Metrics of Prometheus

What `GET /metrics` tells, summed over all workers. [web/monitor](../../nbs/web/monitor.ipynb) counts them,
[`ops/alerts.yml`](../../ops/alerts.yml) has the alerts, each with what a person should do, and `compose.yaml` a
dashboard.

{table("name|type|labels|what it is", list(rows.values()))}
"""


def schema_words(schema: dict) -> str:
    "A schema of OpenAPI in a few words."
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{anchor(name)})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(schema_words(part) for part in schema[key]))
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if schema.get("type") == "array":
        return f"list of {schema_words(schema.get('items', {}))}"
    if schema.get("type") == "object" and schema.get("properties"):
        return "object with " + ", ".join(f"`{name}`" for name in schema["properties"])
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {schema_words(schema['additionalProperties'])}"
    bounds = [
        f"{sign} {schema[key]}"
        for key, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
            ("minLength", "at least"),
            ("maxLength", "at most"),
            ("maxItems", "at most"),
        )
        if key in schema
    ]
    kinds = schema.get("type", "any")
    return ", ".join([kinds if isinstance(kinds, str) else " or ".join(kinds), *bounds])


def default_of(schema: dict) -> str:
    return f"default `{json.dumps(schema['default'])}`" if schema.get("default") is not None else ""


def schema_rows(schema: dict) -> list[tuple]:
    "The fields of an object, those of the objects in its lists too."
    required, rows = set(schema.get("required", [])), []
    for name, said in schema.get("properties", {}).items():
        rows.append(
            (
                named(name, schema_words(said), "required" if name in required else default_of(said)),
                said.get("description", ""),
            )
        )
        rows += [(inner.replace("`", f"`{name}[].", 1), says) for inner, says in schema_rows(said.get("items", {}))]
    return rows


def operation(method: str, path: str, spec: dict) -> str:
    parts = [f"### {method.upper()} {path}", spec.get("summary", "") + ".", spec.get("description", "")]
    rows = [
        (
            named(field["name"], field["in"], schema_words(field["schema"]), default_of(field["schema"])),
            field.get("description", ""),
        )
        for field in spec.get("parameters", [])
    ]
    if rows:
        parts.append(table("parameter|", rows))
    for kind, content in spec.get("requestBody", {}).get("content", {}).items():
        parts.append(f"Body ({kind}): {schema_words(content['schema'])}")
        for variant in content["schema"].get("oneOf", content["schema"].get("anyOf", [content["schema"]])):
            if fields := schema_rows(variant):
                parts.append(table("field|", fields))
        for example in list(content.get("examples", {}).values())[:1]:
            parts.append(f"```json\n{json.dumps(example['value'], indent=2)}\n```")
    answers, problems = [], []
    for status, answer in spec["responses"].items():
        content = answer.get("content", {})
        if "application/problem+json" in content:
            problems.append(status)
            continue
        kinds = " or ".join(schema_words(body.get("schema", {})) for body in content.values())
        answers.append((named(status, kinds), answer.get("description", "")))
    parts.append(table("answer|", answers))
    if problems:
        parts.append(f"Problem documents: {', '.join(f'`{status}`' for status in problems)}.")
    return "\n\n".join(part for part in parts if part)


def http() -> str:
    with tempfile.TemporaryDirectory() as folder:
        spec = create_app(Settings(auth="off", database_url="", models_dir=Path(folder))).openapi()
    by_tag: dict[str, list[str]] = {}
    headers: dict[str, str] = {}
    for path, methods in spec["paths"].items():
        for method, route in methods.items():
            by_tag.setdefault(route["tags"][0], []).append(operation(method, path, route))
            for answer in route["responses"].values():
                headers |= {name: said.get("description", "") for name, said in answer.get("headers", {}).items()}
    routes = "\n\n".join(f"## {tag.capitalize()}\n\n" + "\n\n".join(parts) for tag, parts in by_tag.items())
    schemas = []
    for name, schema in sorted(spec["components"]["schemas"].items()):
        rows = schema_rows(schema)
        body = table("field|", rows) if rows else schema_words(schema)
        schemas.append(f"### {name}\n\n{schema.get('description', '')}\n\n{body}")
    return f"""# HTTP

The routes of the service. {" ".join(spec["info"]["description"].split())}

A running service shows the same at `/docs`, where it can be tried.

{routes}

## Headers of answers

{table("header|what it says", [(f"`{name}`", said) for name, said in headers.items()])}

## Bodies

{chr(10).join(part + chr(10) for part in schemas)}"""


def verb(name: str, command, parent) -> list[str]:
    "A verb of the command, and those below it."
    import click

    context = click.Context(command, info_name=name, parent=parent)
    usage = context.command_path + " " + " ".join(command.collect_usage_pieces(context))
    depth = "##" if parent.parent is None else "###"
    parts = [f"{depth} {context.command_path}", inspect.cleandoc(command.help or ""), f"```text\n{usage.strip()}\n```"]
    rows = []
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record and "--help" not in parameter.opts:
            says = re.sub(r"\s+", " ", record[1])
            rows.append((f"`{record[0]}`", says))
    if rows:
        parts.append(table("option|", rows))
    if command.epilog:
        example = inspect.cleandoc(command.epilog.replace("\b", ""))
        parts.append(
            "```sh\n"
            + "\n".join(line.strip() for line in re.sub(r"^examples?:\s*", "", example).splitlines() if line.strip())
            + "\n```"
        )
    for below, child in getattr(command, "commands", {}).items():
        parts += verb(below, child, context)
    return parts


def command_line() -> str:
    import click

    top = typer.main.get_command(app)
    context = click.Context(top, info_name="product-recs")
    parts = []
    for name in top.list_commands(context):
        parts += verb(name, top.get_command(context, name), context)
    examples = inspect.cleandoc(top.epilog.replace("\b", "")).splitlines()[1:]
    return (
        "# Command line\n\nThe verbs of `product-recs`. `product-recs VERB --help` prints the same; "
        "[jobs/cli](../../nbs/jobs/cli.ipynb) is its source.\n\n```sh\n"
        + "\n".join(line.strip() for line in examples)
        + "\n```\n\n"
        + "\n\n".join(parts)
        + "\n"
    )


def reference_pages() -> dict[str, str]:  # name -> Markdown
    "The pages of the reference, in the order of its table of contents."
    return {
        "command": command_line(),
        "settings": settings(),
        "parameters": parameters(),
        "http": http(),
        "metrics": quality(),
        "prometheus": prometheus(),
    }
