"""What a run shows when it ends: the table, the report, and both in the Prefect UI."""

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from tasks.config.run import RunConfig
from tasks.errors import disk_full, short
from tasks.log import log
from tasks.report.files import REPORT_FILE, TABLE_FILE, write_report
from tasks.report.notes import difference_lines, identical, run_notes, share_lines
from tasks.report.page import report_data, report_html, run_summary
from tasks.report.since import since
from tasks.report.table import mean_rows, rows, table_text
from tasks.results.run import Run


def announce(config: RunConfig, page: str | None) -> None:
    """Show the configuration in the Prefect UI, with a link to the run in MLflow, if any."""
    shown = f"```json\n{config.model_dump_json(indent=2)}\n```"
    create_markdown_artifact(key="configuration", markdown=shown)
    if page:
        create_link_artifact(link=page, link_text="This run in MLflow", key="mlflow-run")
        log(f"MLflow: {page}")


def publish(run: Run) -> Run:
    """Write the run's table and report, and show them in the Prefect UI.

    Returns the run with its summary. A report that cannot be made is noted as missing: no score is
    lost.
    """
    mean = run.overall
    assert mean is not None
    table = rows(run.cells)
    notes = run_notes(run)
    lines = notes + share_lines(table) + difference_lines(mean, identical(run.cells))
    try:
        changed = since(run)
        lines += changed.lines() if changed else []
        data = report_data(run, table, notes, changed)
        path = write_report(run.report, REPORT_FILE, report_html(data))
        run = run.model_copy(update={"summary": run_summary(data)})
        log(f"report: {path}")
        create_markdown_artifact(key="report", markdown=f"The report is in `{path}`.")
    except Exception as error:
        if disk_full(error):
            raise
        line = f"the report was not made ({type(error).__name__}: {short(error)})"
        log(line, warning=True)
        run = run.model_copy(update={"missing": (*run.missing, line)})
    table += mean_rows(mean)
    text = table_text(table, lines, run.missing)
    write_report(run.report, TABLE_FILE, text)
    log("comparison\n" + text)
    create_table_artifact(
        key="comparison",
        table=[{key: str(value) for key, value in row.items()} for row in table],
        description="\n\n".join(
            ["Methods on the same users, prompts and seed.", *lines, *run.missing]
        ),
    )
    return run
