//! Records in Parquet files (`docs/spec/training.md` §3.4).

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::file::writer::SerializedFileWriter;
use parquet::record::Field;
use parquet::schema::parser::parse_message_type;

use crate::Record;

const SCHEMA: &str = "message record {
    REQUIRED BYTE_ARRAY uuid (STRING);
    REQUIRED BYTE_ARRAY source (STRING);
    OPTIONAL BYTE_ARRAY messages (STRING);
    OPTIONAL BYTE_ARRAY segments (STRING);
    OPTIONAL BYTE_ARRAY images (STRING);
    OPTIONAL BYTE_ARRAY videos (STRING);
}";
/// Rows that are written and read at once.
const GROUP_ROWS: usize = 256;
/// A row group that says it is larger is not read.
const GROUP_BYTES: i64 = 4 << 30;

/// A row as the file has it: columns of JSON.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Row {
    /// Names the sample.
    pub uuid: String,
    /// Name of the data set.
    pub source: String,
    /// The conversation; or `segments`.
    pub messages: Option<String>,
    /// The document; or `messages`.
    pub segments: Option<String>,
    /// Pictures by name.
    pub images: Option<String>,
    /// Clips by name.
    pub videos: Option<String>,
}

/// Why a file of records cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RowsError {
    /// The file system.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// The format.
    #[error("{}: {source}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// The reader's word.
        source: ParquetError,
    },
    /// A file that is not one of records.
    #[error("{}: {reason}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// Expected and found.
        reason: String,
    },
}

impl From<&Record> for Row {
    fn from(record: &Record) -> Self {
        let json = |value: serde_json::Result<String>| value.ok();
        Self {
            uuid: record.uuid.clone(),
            source: record.source.clone(),
            messages: json(serde_json::to_string(&record.messages)),
            segments: None,
            images: json(serde_json::to_string(&record.images)),
            videos: json(serde_json::to_string(&record.videos)),
        }
    }
}

/// Writes rows as a new file, 256 to a row group.
///
/// # Errors
/// When the file is there already, or cannot be written.
pub fn write_rows(path: &Path, rows: &[Row]) -> Result<(), RowsError> {
    let mut writer = RowWriter::create(path)?;
    rows.iter().try_for_each(|row| writer.push(row.clone()))?;
    writer.finish()
}

/// A new file of records, written 256 rows at a time to `NAME.partial`; it has its name when it is whole.
pub struct RowWriter {
    path: PathBuf,
    partial: PathBuf,
    writer: SerializedFileWriter<File>,
    waiting: Vec<Row>,
}

impl RowWriter {
    /// Begins a file.
    ///
    /// # Errors
    /// When it is there already, or cannot be written.
    pub fn create(path: &Path) -> Result<Self, RowsError> {
        if path.exists() {
            let reason = "it is there already; choose another name or remove it".into();
            return Err(RowsError::Refused { path: path.into(), reason });
        }
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".partial");
        let partial = path.with_file_name(name);
        let parquet = |source| RowsError::Parquet { path: partial.clone(), source };
        let file = File::create(&partial).map_err(|source| RowsError::Io { path: partial.clone(), source })?;
        let schema = Arc::new(parse_message_type(SCHEMA).map_err(parquet)?);
        let properties = Arc::new(WriterProperties::builder().set_compression(Compression::SNAPPY).build());
        let writer = SerializedFileWriter::new(file, schema, properties).map_err(parquet)?;
        Ok(Self { path: path.into(), partial, writer, waiting: Vec::new() })
    }

    /// Adds a row.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn push(&mut self, row: Row) -> Result<(), RowsError> {
        self.waiting.push(row);
        if self.waiting.len() == GROUP_ROWS {
            self.write_group()?;
        }
        Ok(())
    }

    /// Writes what is left, and gives the file its name.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(mut self) -> Result<(), RowsError> {
        if !self.waiting.is_empty() {
            self.write_group()?;
        }
        self.writer.finish().map_err(|source| RowsError::Parquet { path: self.partial.clone(), source })?;
        std::fs::rename(&self.partial, &self.path).map_err(|source| RowsError::Io { path: self.path.clone(), source })
    }

    fn write_group(&mut self) -> Result<(), RowsError> {
        let parquet = |source| RowsError::Parquet { path: self.partial.clone(), source };
        let columns: [fn(&Row) -> Option<&str>; 6] = [
            |row| Some(&row.uuid),
            |row| Some(&row.source),
            |row| row.messages.as_deref(),
            |row| row.segments.as_deref(),
            |row| row.images.as_deref(),
            |row| row.videos.as_deref(),
        ];
        let rows = std::mem::take(&mut self.waiting);
        let mut group = self.writer.next_row_group().map_err(parquet)?;
        for (index, column) in columns.iter().enumerate() {
            let Some(mut out) = group.next_column().map_err(parquet)? else { break };
            let values: Vec<ByteArray> = rows.iter().filter_map(|row| column(row)).map(ByteArray::from).collect();
            let there: Vec<i16> = rows.iter().map(|row| i16::from(column(row).is_some())).collect();
            let optional = (index >= 2).then_some(&there[..]);
            out.typed::<ByteArrayType>().write_batch(&values, optional, None).map_err(parquet)?;
            out.close().map_err(parquet)?;
        }
        group.close().map_err(parquet)?;
        Ok(())
    }
}

impl Drop for RowWriter {
    fn drop(&mut self) {
        // Nothing is there any more once it has its name.
        let _ = std::fs::remove_file(&self.partial);
    }
}

/// An open file of records, read one row group at a time.
pub struct RowFile {
    path: PathBuf,
    reader: SerializedFileReader<File>,
}

impl RowFile {
    /// Opens a file and reads its table of contents.
    ///
    /// # Errors
    /// A file that is no Parquet, has neither `messages` nor `segments`, or holds no row.
    pub fn open(path: &Path) -> Result<Self, RowsError> {
        let file = File::open(path).map_err(|source| RowsError::Io { path: path.into(), source })?;
        let reader =
            SerializedFileReader::new(file).map_err(|source| RowsError::Parquet { path: path.into(), source })?;
        let opened = Self { path: path.into(), reader };
        let schema = opened.reader.metadata().file_metadata().schema_descr();
        let names: Vec<&str> = schema.columns().iter().map(|column| column.name()).collect();
        if !names.contains(&"messages") && !names.contains(&"segments") {
            return Err(opened.refused(format!("expected a column messages or segments, found {}", names.join(", "))));
        }
        match opened.groups().iter().sum::<usize>() {
            0 => Err(opened.refused("it has no row".into())),
            _ => Ok(opened),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Rows of every row group.
    pub fn groups(&self) -> Vec<usize> {
        let groups = self.reader.metadata().row_groups();
        groups.iter().map(|group| usize::try_from(group.num_rows()).unwrap_or(0)).collect()
    }

    /// The rows of a group below the number of [`RowFile::groups`].
    ///
    /// # Errors
    /// Damage; columns that are not text; a group above 4 GiB.
    pub fn read(&self, group: usize) -> Result<Vec<Row>, RowsError> {
        let parquet = |source| RowsError::Parquet { path: self.path.clone(), source };
        let size = self.reader.metadata().row_group(group).total_byte_size();
        if !(0..=GROUP_BYTES).contains(&size) {
            return Err(self.refused(format!("row group {group} has {size} bytes, the limit is {GROUP_BYTES}")));
        }
        let reader = self.reader.get_row_group(group).map_err(parquet)?;
        let mut rows = Vec::new();
        for read in reader.get_row_iter(None).map_err(parquet)? {
            let mut row = Row::default();
            for (name, field) in read.map_err(parquet)?.get_column_iter() {
                let text = match field {
                    Field::Null => None,
                    Field::Str(text) => Some(text.clone()),
                    Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).ok().map(str::to_owned),
                    _ => None,
                };
                match name.as_str() {
                    "uuid" => row.uuid = text.unwrap_or_default(),
                    "source" => row.source = text.unwrap_or_default(),
                    "messages" => row.messages = text,
                    "segments" => row.segments = text,
                    "images" => row.images = text,
                    "videos" => row.videos = text,
                    _ => {}
                }
            }
            rows.push(row);
        }
        match self.groups().get(group) == Some(&rows.len()) {
            true => Ok(rows),
            false => Err(self.refused(format!("row group {group} ends after {} rows", rows.len()))),
        }
    }

    fn refused(&self, reason: String) -> RowsError {
        RowsError::Refused { path: self.path.clone(), reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Split, World};

    #[test]
    fn rows_come_back_as_they_were_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let world = World::new(Split::Train);
        let mut rows: Vec<Row> =
            (0..300).map(|index| Row::from(&Record::write(&world.text(index), dir.path()).unwrap())).collect();
        rows[7].messages = None;
        rows[7].segments = Some("[]".into());
        write_rows(&path, &rows).unwrap();
        let file = RowFile::open(&path).unwrap();
        assert_eq!(file.groups(), [256, 44]);
        let read: Vec<Row> = (0..2).flat_map(|group| file.read(group).unwrap()).collect();
        assert!(read == rows);
        let refused = write_rows(&path, &rows[..1]).unwrap_err().to_string();
        assert!(refused.contains("a.parquet: it is there already") && refused.contains("remove it"), "{refused}");
        assert_eq!(RowFile::open(&path).unwrap().groups(), [256, 44]);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        assert!(matches!(RowFile::open(&path), Err(RowsError::Parquet { .. })));
    }

    #[test]
    fn a_file_that_is_not_finished_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.parquet");
        let mut writer = RowWriter::create(&path).unwrap();
        (0..GROUP_ROWS + 1).try_for_each(|_| writer.push(Row::default())).unwrap();
        assert_eq!(writer.waiting.len(), 1, "rows go to the file as they come");
        drop(writer);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let error = RowWriter::create(&dir.path().join("none/a.parquet")).err().unwrap().to_string();
        assert!(error.contains("a.parquet.partial"), "{error}");
    }
}
