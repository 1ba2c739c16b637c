"""What a pair's two pictures have between them: degradations to undo, the default cartoonist, teachers."""
