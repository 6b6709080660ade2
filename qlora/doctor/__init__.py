"""Whether this machine can do what this program asks of it: a check a module, each a plain function of facts."""
