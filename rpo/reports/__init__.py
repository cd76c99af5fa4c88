"""What a person looks at: self-contained pages, their sections and their figures."""
