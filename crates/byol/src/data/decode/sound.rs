//! Sounds (WAV, FLAC, Ogg Vorbis, MP3) as images: log-mel spectrograms of one channel, high
//! frequencies at the top. Channels are averaged; other sample rates are converted.

use std::{
    io::{Cursor, ErrorKind},
    ops::RangeInclusive,
};

use rubato::{Fft, FixedSync, Resampler, audioadapter_buffers::direct::InterleavedSlice};
use symphonia::core::{
    codecs::audio::{AudioDecoder, AudioDecoderOptions},
    errors::Error as SymphoniaError,
    formats::{FormatOptions, FormatReader, TrackType, probe::Hint},
    io::{MediaSource, MediaSourceStream, ReadOnlySource},
    meta::MetadataOptions,
};

use super::{
    DecodeError,
    channels::greatest_common_divisor,
    log_mel::{BANDS, LogMel},
};
use crate::{data::levels::Sound, image::Image};

/// Sample rates that are read, in Hz. Lower ones have fewer frequencies than bands.
pub const RATES: RangeInclusive<u32> = 4000..=384_000;

/// Maximum number of samples per channel: ten minutes at 48 kHz.
pub const MAX_SAMPLES: usize = 600 * 48_000;

/// Samples of the longest frame of an MP3 file.
const MP3_FRAME: u64 = 1152;

/// Maximum number of columns of a spectrogram: that of BYOL-A's segments of 0.95 s. Longer sounds
/// average the energies of consecutive frames.
const MAX_COLUMNS: usize = 96;

/// Logarithms of energies that become 0 and 1: the floor of silence, and more than a sine of full
/// scale.
pub const RANGE: [f32; 2] = [-16.0, 8.0];

/// Format of a file with these first bytes, if it is a sound.
pub(in crate::data) fn format(head: &[u8]) -> Option<&'static str> {
    let is_mp3_frame = |head: &[u8]| {
        // 11 bits of synchronization, layer III, and neither a free bit rate nor an invalid one.
        head.len() > 2 && head[0] == 0xff && head[1] & 0xe6 == 0xe2 && !matches!(head[2] >> 4, 0 | 15)
    };
    match head {
        _ if head.starts_with(b"RIFF") && head.get(8..12) == Some(b"WAVE") => Some("WAV"),
        _ if head.starts_with(b"fLaC") => Some("FLAC"),
        _ if head.starts_with(b"OggS") => Some("Ogg"),
        _ if head.starts_with(b"ID3") || is_mp3_frame(head) => Some("MP3"),
        _ => None,
    }
}

/// A sound with its channels averaged.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::data) struct Waveform {
    /// Samples per second.
    pub rate: u32,
    /// Samples, usually in -1..1.
    pub samples: Vec<f32>,
}

/// An opened file.
struct Opened {
    format: &'static str,
    reader: Box<dyn FormatReader>,
    track: u32,
    rate: u32,
    /// Samples per channel, if the file tells.
    length: Option<u64>,
    decoder: Box<dyn AudioDecoder>,
}

impl Opened {
    fn new(bytes: &[u8]) -> Result<Opened, DecodeError> {
        if bytes.is_empty() {
            return Err(DecodeError::Empty);
        }
        let format = format(bytes).ok_or(DecodeError::NotASound)?;
        let broken = |e: SymphoniaError| DecodeError::Broken { format, reason: e.to_string() };
        let source: Box<dyn MediaSource> = match format {
            // If it can seek, the length of an MP3 file without one is estimated.
            "MP3" => Box::new(ReadOnlySource::new(Cursor::new(bytes.to_vec()))),
            _ => Box::new(Cursor::new(bytes.to_vec())),
        };
        let stream = MediaSourceStream::new(source, Default::default());
        let probe = symphonia::default::get_probe();
        let reader =
            probe.probe(&Hint::new(), stream, FormatOptions::default(), MetadataOptions::default()).map_err(broken)?;
        let unread = |reason: &str| DecodeError::UnreadSound { format, reason: reason.into() };
        let track = reader.default_track(TrackType::Audio).ok_or_else(|| unread("no sound in it"))?;
        let codec = track.codec_params.as_ref().and_then(|params| params.audio());
        let codec = codec.ok_or_else(|| unread("an unknown encoding"))?;
        let rate = codec.sample_rate.ok_or_else(|| unread("no sample rate"))?;
        if !RATES.contains(&rate) {
            return Err(unread(&format!("a sample rate of {rate} Hz")));
        }
        let decoder = symphonia::default::get_codecs()
            .make_audio_decoder(codec, &AudioDecoderOptions::default())
            .map_err(|_| unread("an encoding that is not supported"))?;
        // The length of an Ogg stream includes the time before its start.
        let start = if format == "Ogg" { u64::try_from(track.start_ts.get()).unwrap_or(0) } else { 0 };
        let length = track.num_frames.map(|length| length.saturating_sub(start));
        // Programs that write a WAV file to a pipe declare a length that they cannot reach.
        let is_piped = format == "WAV" && length.is_some_and(|length| length > bytes.len() as u64);
        let length = if is_piped && length > Some(MAX_SAMPLES as u64) { None } else { length };
        let track = track.id;
        if length.is_some_and(|length| length > MAX_SAMPLES as u64) {
            return Err(DecodeError::TooLong);
        }
        Ok(Opened { format, reader, track, rate, length, decoder })
    }
}

/// Sample rate of a file, from its header.
pub(in crate::data) fn rate(bytes: &[u8]) -> Result<u32, DecodeError> {
    Opened::new(bytes).map(|opened| opened.rate)
}

/// Decodes a file.
pub(in crate::data) fn waveform(bytes: &[u8]) -> Result<Waveform, DecodeError> {
    let Opened { format, mut reader, track, rate, length, mut decoder } = Opened::new(bytes)?;
    let broken = |reason: String| DecodeError::Broken { format, reason };
    let (mut samples, mut packet_samples) = (Vec::new(), Vec::<f32>::new());
    loop {
        let packet = match reader.next_packet() {
            Ok(Some(packet)) => packet,
            Ok(None) => break,
            // The end of a file of unknown length.
            Err(SymphoniaError::IoError(e))
                if e.kind() == ErrorKind::UnexpectedEof && format == "WAV" && length.is_none() =>
            {
                break;
            }
            Err(e) => return Err(broken(e.to_string())),
        };
        if packet.track_id != track {
            continue;
        }
        let buffer = decoder.decode(&packet).map_err(|e| broken(e.to_string()))?;
        let channels = buffer.spec().channels().count().max(1);
        if buffer.spec().rate() != rate {
            return Err(DecodeError::UnreadSound { format, reason: "its sample rate changes".into() });
        }
        packet_samples.resize(buffer.samples_interleaved(), 0.0);
        buffer.copy_to_slice_interleaved(&mut packet_samples);
        samples.extend(packet_samples.chunks_exact(channels).map(|s| s.iter().sum::<f32>() / channels as f32));
        if samples.len() > MAX_SAMPLES {
            return Err(DecodeError::TooLong);
        }
    }
    // The last frame of an MP3 file may be incomplete.
    let missing = if format == "MP3" { MP3_FRAME } else { 0 };
    if let Some(length) = length.filter(|length| *length > samples.len() as u64 + missing) {
        return Err(broken(format!("it has {} of {length} samples", samples.len())));
    }
    if samples.is_empty() {
        return Err(DecodeError::NoSamples);
    }
    if samples.iter().any(|s| !s.is_finite()) {
        return Err(DecodeError::NotFinite);
    }
    Ok(Waveform { rate, samples })
}

impl Waveform {
    /// Converts to another sample rate.
    pub fn resampled(self, rate: u32) -> Waveform {
        /// Least number of samples per transform: enough for a steep filter.
        const CHUNK: usize = 4096;
        if self.rate == rate {
            return self;
        }
        // An even number of the shortest blocks: an odd one would shift the sound by half a sample.
        let block = 2 * self.rate as usize / greatest_common_divisor(self.rate as usize, rate as usize);
        let chunk = CHUNK.next_multiple_of(block);
        let n = self.samples.len();
        let input = InterleavedSlice::new(&self.samples, 1, n).expect("one channel");
        let resampler = Fft::<f32>::new_custom(
            self.rate as usize,
            rate as usize,
            chunk,
            1,
            1,
            rubato::WindowFunction::BlackmanHarris2,
            FixedSync::Input,
        );
        let mut resampler = resampler.expect("both rates are positive");
        let samples = resampler.process_all(&input, n, None).expect("the input has the declared length").take_data();
        Waveform { rate, samples }
    }

    /// Log-mel spectrogram, `[BANDS, columns, 1]` with at most [`MAX_COLUMNS`] columns.
    pub fn spectrogram(&self) -> Image {
        let log_mel = LogMel::at(self.rate);
        let pool = log_mel.frames(self.samples.len()).div_ceil(MAX_COLUMNS);
        let values = log_mel.compute(&self.samples, pool);
        let columns = values.len() / BANDS;
        let [low, high] = RANGE;
        let pixel = |i: usize| {
            let (row, column) = (i / columns, i % columns);
            let value = values[column * BANDS + (BANDS - 1 - row)];
            ((value - low) / (high - low) * f32::from(u16::MAX)).round() as u16
        };
        let pixels: Vec<u16> = (0..BANDS * columns).map(pixel).collect();
        Image { height: BANDS, width: columns, channels: 1, pixels: pixels.into() }
    }
}

/// Decodes a file to a spectrogram.
pub(super) fn decode(bytes: &[u8], sound: &Sound) -> Result<Image, DecodeError> {
    Ok(waveform(bytes)?.resampled(sound.rate).spectrogram())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Pixels;

    /// The same sound in four formats (golden/sound.py): 440 Hz on the left, 1500 Hz on the right.
    const TONES: [(&str, &[u8]); 4] = [
        ("WAV", include_bytes!("../../../../../golden/tone.wav")),
        ("FLAC", include_bytes!("../../../../../golden/tone.flac")),
        ("Ogg", include_bytes!("../../../../../golden/tone.ogg")),
        ("MP3", include_bytes!("../../../../../golden/tone.mp3")),
    ];

    /// Signal of the tones, averaged over the channels.
    fn tone(i: usize) -> f32 {
        let sine = |hz: f32| 12000.0 / 32768.0 * (std::f32::consts::TAU * hz * i as f32 / 16_000.0).sin();
        (sine(440.0) + sine(1500.0)) / 2.0
    }

    #[test]
    fn formats_decode_to_the_same_sound() {
        for (name, bytes) in TONES {
            assert_eq!(format(bytes), Some(name));
            let sound = waveform(bytes).unwrap();
            assert_eq!((sound.rate, rate(bytes).unwrap()), (16_000, 16_000));
            let error = (0..sound.samples.len()).map(|i| (sound.samples[i] - tone(i)).abs()).skip(1200).take(2400);
            let (error, is_lossless) = (error.fold(0.0, f32::max), matches!(name, "WAV" | "FLAC"));
            assert!(error < if is_lossless { 1e-4 } else { 0.05 }, "{name}: off by {error}");
            let image = decode(bytes, &Sound { rate: 16_000 }).unwrap();
            assert!((image.height, image.channels) == (64, 1) && (31..40).contains(&image.width), "{name}");
        }
    }

    #[test]
    fn damaged_files_are_refused() {
        for (name, bytes) in TONES {
            assert!(matches!(waveform(&bytes[..bytes.len() / 2]), Err(DecodeError::Broken { .. })), "{name}");
            assert!(waveform(&bytes[..20]).is_err(), "{name}");
        }
        assert!(matches!(waveform(b""), Err(DecodeError::Empty)));
        assert!(matches!(waveform(b"\x89PNG\r\n\x1a\n"), Err(DecodeError::NotASound)));
        assert_eq!(format(b"\xff\xd8\xff\xe0\0\x10JFIF"), None);
    }

    /// A WAV file of 32-bit floats.
    fn wav(samples: &[f32], rate: u32) -> Vec<u8> {
        let data: Vec<u8> = samples.iter().flat_map(|s| s.to_le_bytes()).collect();
        let mut bytes = b"RIFF".to_vec();
        bytes.extend((36 + data.len() as u32).to_le_bytes());
        bytes.extend(b"WAVEfmt \x10\0\0\0\x03\0\x01\0");
        bytes.extend([rate, 4 * rate].map(u32::to_le_bytes).concat());
        bytes.extend(b"\x04\0\x20\0data");
        bytes.extend((data.len() as u32).to_le_bytes());
        [bytes, data].concat()
    }

    #[test]
    fn tags_and_missing_lengths_are_no_damage() {
        let mp3 = TONES[3].1;
        let n = waveform(mp3).unwrap().samples.len();
        // A tag of more than a megabyte before the sound, such as a cover, and a tag behind it.
        let size = 1_200_000usize;
        let mut cover = b"ID3\x03\0\0".to_vec();
        cover.extend([21, 14, 7, 0].map(|shift| (size >> shift & 0x7f) as u8));
        cover.resize(10 + size, 0);
        assert_eq!(waveform(&[&cover, mp3].concat()).unwrap().samples.len(), n);
        let mut tag = b"TAG".to_vec();
        tag.resize(128, 0);
        assert_eq!(waveform(&[mp3, &tag].concat()).unwrap().samples.len(), n);
        // Without the first frame, which has the length.
        let second = 4 + mp3[4..].windows(2).position(|pair| pair == [mp3[0], mp3[1]]).unwrap();
        for bytes in [mp3[second..].to_vec(), [&mp3[second..], &tag].concat()] {
            assert!(waveform(&bytes).unwrap().samples.len() >= n);
        }
        // A program that writes a WAV file to a pipe does not know its length.
        let mut piped = wav(&[0.25; 100], 8000);
        piped[4..8].fill(0xff);
        for length in [u32::MAX, 0x7fff_f000] {
            piped[40..44].copy_from_slice(&length.to_le_bytes());
            assert_eq!(waveform(&piped).unwrap().samples, [0.25; 100]);
        }
    }

    #[test]
    fn samples_must_be_finite_and_not_too_many() {
        assert!(matches!(waveform(&wav(&[], 8000)), Err(DecodeError::NoSamples | DecodeError::Broken { .. })));
        assert!(matches!(waveform(&wav(&[0.0, f32::NAN], 8000)), Err(DecodeError::NotFinite)));
        let long = wav(&vec![0.0; MAX_SAMPLES + 1], 4000);
        assert!(matches!(waveform(&long), Err(DecodeError::TooLong)));
        assert!(matches!(waveform(&wav(&[0.0; 100], 100)), Err(DecodeError::UnreadSound { .. })));
    }

    #[test]
    fn other_rates_are_converted() {
        for rate in [8000, 12_345, 22_050, 44_100, 48_000] {
            let sine = |i: usize, rate: u32| (std::f64::consts::TAU * 440.0 * i as f64 / f64::from(rate)).sin() as f32;
            let samples = (0..rate as usize).map(|i| sine(i, rate)).collect();
            let sound = Waveform { rate, samples }.resampled(16_000);
            assert_eq!((sound.rate, sound.samples.len()), (16_000, 16_000), "{rate} Hz");
            let error = (4000..12_000).map(|i| (sound.samples[i] - sine(i, 16_000)).abs()).fold(0.0, f32::max);
            assert!(error < 1e-3, "{rate} Hz: off by {error}");
        }
    }

    #[test]
    fn spectrograms_have_a_limited_width_and_low_frequencies_at_the_bottom() {
        let sound = |n: usize| Waveform { rate: 16_000, samples: (0..n).map(tone).collect() };
        assert_eq!([800, 15_200, 16_000, 80_000].map(|n| sound(n).spectrogram().width), [6, 96, 51, 84]);
        let image = sound(16_000).spectrogram();
        let Pixels::U16(pixels) = &image.pixels else { panic!("16 bits") };
        let loudest = (0..64).max_by_key(|row| pixels[row * image.width + 20]).unwrap();
        assert!(loudest > 32, "1500 Hz is in the lower half: row {loudest}");
    }
}
