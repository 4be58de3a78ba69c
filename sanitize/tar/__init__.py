"""Archives: a strict reader, a fast one for plain archives, a writer; names of members and their compression."""
