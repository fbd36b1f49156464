"""What guards a run, and knows no model: lock, signals, watchdog, alarms, budgets, epoch audit, metrics, dashboards."""
