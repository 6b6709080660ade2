"""What an answer that grpo draws is worth: rewards of the recipe, and Python functions named on the command line."""
