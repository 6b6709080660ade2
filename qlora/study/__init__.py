"""Study: the base asks itself about documents, answers with the passage in view, and learns the answers without it."""
