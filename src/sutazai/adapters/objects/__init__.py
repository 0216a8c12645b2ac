"""Objects in a folder or in S3, over obstore."""
