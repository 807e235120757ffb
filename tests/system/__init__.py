"""The programs as their users start them: command line, workers, stack, browser, docs, deployment."""
