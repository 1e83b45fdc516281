"""Array tasks: submitting, following and cancelling them, their records and logs."""
