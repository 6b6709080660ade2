"""What a model will see of a recipe's rows: counted, compared and taken apart token by token."""
