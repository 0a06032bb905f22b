"""Reports and figures of NIAH."""

from hooked_hybrid.niah.report.report import (
    CAUTION,
    Written,
    save_pictures,
    summary_rows,
    versions,
    write_report,
)

__all__ = [
    "CAUTION",
    "Written",
    "save_pictures",
    "summary_rows",
    "versions",
    "write_report",
]
