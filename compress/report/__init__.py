"""Report: run.json as one offline HTML page, as Markdown for comments, and as JSON; and several artifacts side by side.

The page loads nothing: style and plots are inside it. Names and texts of strangers are escaped in every form.
"""

from compress.report.compare import Comparison, compare, comparison
from compress.report.data import ReportData, report_data
from compress.report.render import write_report

__all__ = ["Comparison", "ReportData", "compare", "comparison", "report_data", "write_report"]
