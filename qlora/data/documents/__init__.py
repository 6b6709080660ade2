"""Documents: files that people read (Markdown, HTML, PDF, DOCX, EPUB, text) become blocks, and blocks passages."""
