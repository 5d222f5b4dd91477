"""The laws on a user's own machine."""

from dualform.core.lazy import explain_call

explain_call(__name__, "from dualform.check.run import run_checks; run_checks(['mamba2']); dualform check is a command")
