//! TensorBoard event files: TFRecords of `Event` messages with scalars, texts and images.
//!
//! A record is a length, its masked CRC-32C, the message in protocol-buffer encoding, and its
//! masked CRC-32C.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

/// An open event file.
#[derive(Debug)]
pub struct EventFile {
    file: File,
}

impl EventFile {
    /// Creates an event file in `folder`. TensorBoard shows all event files of a folder as one run,
    /// so a resumed run creates another.
    ///
    /// # Errors
    /// I/O errors.
    pub fn create(folder: &Path) -> io::Result<EventFile> {
        fs::create_dir_all(folder)?;
        let seconds = now();
        let name = format!("events.out.tfevents.{:.0}.{}.byol", seconds, std::process::id());
        let mut events = EventFile { file: File::create(folder.join(name))? };
        let mut message = Vec::new();
        field_f64(&mut message, 1, seconds);
        field_bytes(&mut message, 3, b"brain.Event:2");
        events.record(&message)?;
        Ok(events)
    }

    /// Appends the scalars of one step.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> io::Result<()> {
        let values: Vec<Vec<u8>> = values.iter().map(|(tag, value)| scalar(tag, *value)).collect();
        self.record(&event(now(), step, &values))
    }

    /// Appends a Markdown text.
    ///
    /// # Errors
    /// I/O errors.
    pub fn text(&mut self, step: u64, tag: &str, markdown: &str) -> io::Result<()> {
        self.record(&event(now(), step, &[text(tag, markdown)]))
    }

    /// Appends an RGB image, encoded as PNG.
    ///
    /// # Errors
    /// I/O errors.
    pub fn image(&mut self, step: u64, tag: &str, [width, height]: [u32; 2], png: &[u8]) -> io::Result<()> {
        self.record(&event(now(), step, &[image(tag, [width, height], png)]))
    }

    fn record(&mut self, message: &[u8]) -> io::Result<()> {
        let mut record = (message.len() as u64).to_le_bytes().to_vec();
        let length_crc = masked_crc(&record);
        record.extend(length_crc.to_le_bytes());
        record.extend(message);
        record.extend(masked_crc(message).to_le_bytes());
        self.file.write_all(&record)
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// Encodes Event { wall_time = 1, step = 2, summary = 5 { value = 1 } }.
fn event(wall_time: f64, step: u64, values: &[Vec<u8>]) -> Vec<u8> {
    let mut summary = Vec::new();
    values.iter().for_each(|value| field_bytes(&mut summary, 1, value));
    let mut event = Vec::new();
    field_f64(&mut event, 1, wall_time);
    field_varint(&mut event, 2, step);
    field_bytes(&mut event, 5, &summary);
    event
}

/// Encodes Value { tag = 1, simple_value = 2 }.
fn scalar(tag: &str, value: f64) -> Vec<u8> {
    let mut out = Vec::new();
    field_bytes(&mut out, 1, tag.as_bytes());
    out.push(2 << 3 | 5); // field 2, 32-bit
    out.extend((value as f32).to_le_bytes());
    out
}

/// Encodes Value { tag = 1, tensor = 8 { dtype = 1, shape = 2 { dim = 2 { size = 1 } },
/// string_val = 8 }, metadata = 9 { plugin_data = 1 { plugin_name = 1 } } }.
fn text(tag: &str, markdown: &str) -> Vec<u8> {
    /// `DT_STRING`.
    const STRING: u64 = 7;
    let (mut size, mut shape, mut tensor) = (Vec::new(), Vec::new(), Vec::new());
    field_varint(&mut size, 1, 1);
    field_bytes(&mut shape, 2, &size);
    field_varint(&mut tensor, 1, STRING);
    field_bytes(&mut tensor, 2, &shape);
    field_bytes(&mut tensor, 8, markdown.as_bytes());
    let (mut plugin, mut metadata, mut out) = (Vec::new(), Vec::new(), Vec::new());
    field_bytes(&mut plugin, 1, b"text");
    field_bytes(&mut metadata, 1, &plugin);
    field_bytes(&mut out, 1, tag.as_bytes());
    field_bytes(&mut out, 8, &tensor);
    field_bytes(&mut out, 9, &metadata);
    out
}

/// Encodes Value { tag = 1, image = 4 { height = 1, width = 2, colorspace = 3, encoded = 4 } }.
fn image(tag: &str, [width, height]: [u32; 2], png: &[u8]) -> Vec<u8> {
    const RGB: u64 = 3;
    let (mut image, mut out) = (Vec::new(), Vec::new());
    field_varint(&mut image, 1, height.into());
    field_varint(&mut image, 2, width.into());
    field_varint(&mut image, 3, RGB);
    field_bytes(&mut image, 4, png);
    field_bytes(&mut out, 1, tag.as_bytes());
    field_bytes(&mut out, 4, &image);
    out
}

fn field_varint(out: &mut Vec<u8>, field: u8, value: u64) {
    out.push(field << 3);
    varint(out, value);
}

fn field_f64(out: &mut Vec<u8>, field: u8, value: f64) {
    out.push(field << 3 | 1);
    out.extend(value.to_le_bytes());
}

fn field_bytes(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// CRC-32C (Castagnoli), rotated and offset as in TFRecord.
fn masked_crc(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82F6_3B78 } else { crc >> 1 };
        }
    }
    (!crc).rotate_right(15).wrapping_add(0xA282_EAD8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_crc_32c() {
        // CRC-32C of "123456789" is 0xE3069283.
        assert_eq!(masked_crc(b"123456789"), 0xE306_9283u32.rotate_right(15).wrapping_add(0xA282_EAD8));
    }

    #[test]
    fn event_has_the_documented_bytes() {
        let bytes = event(0.0, 300, &[scalar("a", 1.0)]);
        assert_eq!(
            text("a", "b"),
            [10, 1, b'a', 66, 11, 8, 7, 18, 4, 18, 2, 8, 1, 66, 1, b'b', 74, 8, 10, 6, 10, 4, b't', b'e', b'x', b't']
        );
        assert_eq!(image("a", [2, 300], &[7]), [10, 1, b'a', 34, 10, 8, 0xAC, 2, 16, 2, 24, 3, 34, 1, 7]);
        assert_eq!(bytes, [9, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0xAC, 2, 42, 10, 10, 8, 10, 1, b'a', 21, 0, 0, 0x80, 0x3F]);
    }
}
