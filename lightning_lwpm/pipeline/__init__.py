"""When what runs: schedules, and their execution over ranks."""
