"""Guards of a run, without its model: lock, signals, watchdog, alarms, budgets, epoch audit, metrics, dashboards."""
