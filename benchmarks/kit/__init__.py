"""What every study needs: files, tables, pictures, options, times, a journal of what is done."""
