"""Files in, reconstructions out: images, tasks, metrics, reports and the command line. Needs no torch."""
