module scratch

go 1.27
